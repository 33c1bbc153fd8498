"""What the vLLM engine needs of its machine: environment variables, and the arguments that differ with the device."""

import os
from typing import Any

from palimpsest.common.config.engines import VllmEngineConfig
from palimpsest.common.logs import logger
from palimpsest.common.user_error import UserError
from palimpsest.services.rollout.engine import amx

_ONE_PROCESS = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
"""Given as a class path. With the short name, the CPU build starts a second process that only busy-waits for the first:
half the tokens a second, and a start that takes 20 s longer (docs/decisions/0003)."""
_PROCESSES = "mp"


def engine_arguments(config: VllmEngineConfig, *, cpu: bool) -> dict[str, Any]:
    """Return vLLM's arguments for memory and processes on this device."""
    if not cpu:
        return {"gpu_memory_utilization": config.gpu_memory_utilization}
    return {
        "kv_cache_memory_bytes": int(config.kv_cache_gib * 2**30),
        "distributed_executor_backend": _ONE_PROCESS if config.tensor_parallel == 1 else _PROCESSES,
    }


def set_environment(config: VllmEngineConfig) -> amx.Amx | None:
    """Set the environment variables that vLLM reads at import. Return the use of AMX; None: the engine uses a GPU."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # standard output is for the results of commands
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    # A forked engine would inherit locks held by this process's threads, and would not enable its crash log.
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    import torch

    if torch.cuda.is_available():
        return None
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # several processes share the machine's cores
    os.environ["OMP_NUM_THREADS"] = str(config.threads)
    os.environ[amx.VARIABLE] = "on" if config.amx else "off"
    chosen = amx.configure()
    logger().info("no GPU: vLLM's CPU engine", threads=config.threads, amx=chosen.value)
    return chosen


def refuse_sleep_of_cpu() -> None:
    """Raise UserError: vLLM's CPU engine cannot sleep."""
    raise UserError(
        "rollout.engine.sleep is true, but vLLM's CPU engine cannot sleep: it keeps its memory. Use a GPU, or remove "
        "rollout.engine.sleep"
    )
