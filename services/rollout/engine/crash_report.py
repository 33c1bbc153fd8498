"""What a person reads when an inference engine has died, from the evidence it left. Pure."""

import json
import re
import signal
from collections.abc import Iterator
from dataclasses import dataclass

from palimpsest.common.text import count
from palimpsest.services.rollout.engine.crash_evidence import ERROR

FRAMES = 5
"""So many calls of the stack are told, the innermost first."""


@dataclass(frozen=True, slots=True)
class CrashEvidence:
    """What is known of a dead engine."""

    doing: str
    """What it was doing: `starting` or `serving`."""
    exit_code: int | None = None
    """Of the engine's process; negative: the signal that ended it. None: nobody knows."""
    pid: int | None = None
    log: str = ""
    """What the engine's processes wrote to their file since they started."""
    path: str = ""
    """Where that file is."""
    silent: str = ""
    """What it did not answer, and for how long, so that the worker ended it; empty: it died of itself."""
    killed_for_memory: int = 0
    """Processes that the kernel has killed for want of memory since the engine started, as far as it tells."""


@dataclass(frozen=True, slots=True)
class ProcessError:
    """An error of one of the engine's processes."""

    process: str
    pid: int
    type: str
    message: str

    def __str__(self) -> str:
        return ": ".join(part for part in (self.type, self.message) if part)


_MEANING = {
    "SIGILL": "an instruction that this CPU does not have or may not use",
    "SIGSEGV": "a native library touched memory that is not its own",
    "SIGBUS": "memory that could not be had, most often a full /dev/shm",
    "SIGABRT": "a native library gave up",
    "SIGKILL": "killed from outside: by the kernel when memory runs out, or by somebody",
}
_TRY = {
    "SIGILL": "start again with --rollout.engine.amx=false. If it dies again, this CPU or the hypervisor lacks what "
    "the engine was built for (docs/installation.md names the CPUs it supports): use another machine",
    "SIGSEGV": "start again; if it dies at the same place again, report that stack to vLLM, or try another model.path",
    "SIGBUS": "make room in /dev/shm (`df -h /dev/shm`; in a container: --shm-size)",
    "SIGABRT": "read what the library said in the worker's log, just before the end",
    "SIGKILL": "see whether memory ran out (`dmesg | grep -i oom`, the container's limit). If it did: a lower "
    "rollout.engine.kv_cache_gib, fewer workers (local.rollout_workers), or more memory",
}
_MEMORY = (
    "lower rollout.engine.kv_cache_gib (on a GPU rollout.engine.gpu_memory_utilization), start fewer workers "
    "(local.rollout_workers), or give the machine or the container more memory"
)
_UNKNOWN = "read the traceback in its log; if nothing there is about this machine or this model, report it to vLLM"
_AGAIN = (
    "start again: the worker comes back with a new engine, and what was under way is sampled again. If that step is "
    "refused again, report its error, with the traceback in logs/WORKER.engine.log, to vLLM"
)
_CACHE = (
    "raise rollout.engine.kv_cache_gib (on a GPU rollout.engine.gpu_memory_utilization), or lower "
    "sampling.max_trajectory_tokens"
)
_LENGTH = (
    "lower sampling.max_trajectory_tokens (the engine needs one token more), or choose a model.path with more positions"
)
_OF_ERRORS = (
    (r"MemoryError|allocate memory|out of memory|bad_alloc|OutOfMemory|Cannot allocate", _MEMORY),
    (r"KV cache|cache blocks", _CACHE),
    (r"max_model_len|max_position_embeddings|model_max_length", _LENGTH),
    (r"tensor.parallel|attention heads", "choose another rollout.engine.tensor_parallel"),
    (r"[Aa]rchitecture|not supported|no vLLM implementation", "choose a model.path that vLLM can serve"),
)
_REFUSING = ("ValueError", "ValidationError", "NotImplementedError")
"""What vLLM raises for a model, or an option, that it cannot serve, however often it is tried."""


def process_errors(log: str) -> list[ProcessError]:
    """The errors that the engine's processes told of, oldest first: the first is the cause of the others."""
    return [ProcessError(**json.loads(line.removeprefix(ERROR))) for line in log.splitlines() if line.startswith(ERROR)]


def root_error(log: str) -> ProcessError | None:
    """The error that the others follow from: the first with a type, else the first."""
    told = process_errors(log)
    return next((failure for failure in told if failure.type), told[0] if told else None)


def refusal_error(evidence: CrashEvidence) -> ProcessError | None:
    """The error by which the engine refused the model or an option of it: starting again would end the same way."""
    failure = root_error(evidence.log)
    died = evidence.exit_code is not None and evidence.exit_code < 0
    if failure is None or died or evidence.doing != "starting" or re.search(_OF_ERRORS[0][0], str(failure)):
        return None
    return failure if failure.type in _REFUSING else None


def model_refusal_text(model: str, error: str) -> str:
    """What a person reads when vLLM refuses the model; `error` with its type and its whole message."""
    return "\n".join([f"vLLM cannot serve the model {model}: {error}", *_advice(error)])


def step_refusal_text(what: str, error: str) -> str:
    """What a person reads when a living engine refuses a step that its worker needs; `error` whole.

    >>> print(step_refusal_text("an update to version 3", "weight update: RuntimeError: CUDA out of memory"))
    the inference engine refused an update to version 3
    its error: weight update: RuntimeError: CUDA out of memory
    what to try: lower rollout.engine.kv_cache_gib (on a GPU rollout.engine.gpu_memory_utilization), start fewer \
workers (local.rollout_workers), or give the machine or the container more memory
    """
    advice = _advice(error) or [f"what to try: {_AGAIN}"]
    return "\n".join([f"the inference engine refused {what}", f"its error: {error}", *advice])


def crash_text(evidence: CrashEvidence) -> str:
    """What a person reads. The first line names the death: it is the same for the same death."""
    failure, name = root_error(evidence.log), _signal_name(evidence.exit_code)
    died = name if name and not evidence.silent else ""
    said = [f"the inference engine {_manner_of_death(evidence, failure, died)} while it was {evidence.doing}"]
    if evidence.killed_for_memory and died == "SIGKILL":
        killed = count(evidence.killed_for_memory, "process", "processes")
        said.append(f"the kernel has killed {killed} for want of memory since it started")
    if failure is not None:
        said.append(f"its error: {failure}")
    said += [f"it was in: {place}" for place in stack(evidence.log)[:1]]
    said += [f"  called by {place}" for place in stack(evidence.log)[1:FRAMES]]
    if evidence.killed_for_memory and died == "SIGKILL":
        said.append(f"what to try: {_MEMORY}")
    elif died in _TRY:
        said.append(f"what to try: {_TRY[died]}")
    elif failure is not None:
        said += _advice(str(failure)) or [f"what to try: {_UNKNOWN}"]
    facts = [f"pid {evidence.pid}"] if evidence.pid is not None else []
    facts += [f"exit code {evidence.exit_code}"] if evidence.exit_code is not None else []
    return "\n".join([*said, f"its process: {', '.join(facts) or 'unknown'}; its log: {evidence.path}"])


def stack(log: str) -> list[str]:
    """The calls of the thread that died, innermost first, as faulthandler wrote them; native ones where it has them.

    >>> stack('Fatal Python error: Aborted\\n\\nCurrent thread 0x01 (most recent call first):\\n'
    ...       '  File "/x/site-packages/vllm/ops.py", line 7 in attend\\n')
    ['vllm/ops.py:7 attend']
    """
    _, fatal, dump = log.rpartition("Fatal Python error: ")
    return list(_calls(dump)) if fatal else []


def _calls(dump: str) -> Iterator[str]:
    wanted = "Current thread" if "Current thread" in dump else "Thread"  # a thread that runs no Python is not listed
    inside = False
    for line in dump.splitlines():
        if "most recent call first" in line:
            inside = line.startswith(wanted)
        elif inside and (call := re.match(r'\s+File "(.+)", line (\d+) in (.+)', line)):
            yield f"{_short_path(call[1])}:{call[2]} {call[3]}"
        elif inside and (call := re.match(r'\s+Binary file "(.+)", at (.+)', line)):
            yield f"{call[1].rpartition('/')[2]}: {call[2]}"


def _short_path(path: str) -> str:
    """The file within its package; of others the last two parts."""
    _, installed, within = path.rpartition("site-packages/")
    return within if installed else "/".join(path.split("/")[-2:])


def _manner_of_death(evidence: CrashEvidence, failure: ProcessError | None, died: str) -> str:
    if evidence.silent:
        return f"did not answer ({evidence.silent}), so the worker ended it"
    if died:
        return f"died of {died} ({_MEANING.get(died, 'a signal')})"
    if failure is not None:
        return f"died of an error ({failure.type or failure.message.splitlines()[0]})"
    if evidence.exit_code is not None:
        return f"ended with exit code {evidence.exit_code}"
    return "died"


def _signal_name(exit_code: int | None) -> str:
    if exit_code is None or exit_code >= 0:
        return ""
    try:
        return signal.Signals(-exit_code).name
    except ValueError:
        return f"signal {-exit_code}"


def _advice(error: str) -> list[str]:
    return [f"what to try: {advice}" for pattern, advice in _OF_ERRORS if re.search(pattern, error)][:1]
