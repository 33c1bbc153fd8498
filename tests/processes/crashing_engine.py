"""Processes that die like an engine's process and leave the same evidence, without vLLM."""

import faulthandler
import logging
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from palimpsest.services.rollout.engine.crash_evidence import enable_crash_log, reinstall_fault_handlers
from palimpsest.services.rollout.engine.process_monitor import EngineMonitor

POSITIONS = """1 validation error for ModelConfig
  Value error, User-specified max_model_len (4097) is greater than the derived max_model_len \
(max_position_embeddings=2048.0 or model_max_length=None in model's config.json)."""


def attend(die: Callable[[], None]) -> None:
    die()


def forward(die: Callable[[], None]) -> None:
    attend(die)


def run_busy_loop(die: Callable[[], None]) -> None:
    forward(die)


def run_engine_core(die: Callable[[], None]) -> None:
    """Like vLLM's function: log an exception and end the process."""
    enable_crash_log(AMX="used")
    try:
        run_busy_loop(die)
    except Exception:
        logging.getLogger("vllm.v1.engine.core").exception("EngineCore failed to start.")
        sys.exit(1)


def illegal_instruction() -> None:
    signal.raise_signal(signal.SIGILL)


def segmentation_fault() -> None:
    faulthandler._sigsegv()


def signal_taken() -> None:
    """Die of SIGSEGV after a library has replaced the handler."""
    signal.signal(signal.SIGSEGV, signal.SIG_DFL)
    reinstall_fault_handlers()
    os.kill(os.getpid(), signal.SIGSEGV)


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def out_of_memory() -> None:
    bytearray(1 << 62)


def python_error() -> None:
    raise KeyError("model.layers.0.mlp.gate.weight")


def model_refused() -> None:
    raise ValueError(POSITIONS)


def sleeps() -> None:
    signal.pause()


def begin(watch: EngineMonitor, die: Callable[[], None]) -> multiprocessing.process.BaseProcess:
    """Start a process that dies by calling `die`."""
    process = multiprocessing.get_context("spawn").Process(target=run_engine_core, args=(die,), name="EngineCore")
    with watch.child_variables():
        process.start()
    return process


def not_started(process: multiprocessing.process.BaseProcess) -> RuntimeError:
    """The error of vLLM when this process ends before it is ready."""
    process.join()
    return RuntimeError(
        "Engine core initialization failed. See root cause above. "
        f"Failed core proc(s): {{'{process.name}': {process.exitcode}}}"
    )


def log_of(folder: Path) -> Path:
    return folder / "logs" / "worker-0.engine.log"
