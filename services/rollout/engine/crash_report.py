"""Builds the error text for an inference engine that died, from the evidence it left. Pure."""

import json
import re
import signal
from collections.abc import Iterator
from dataclasses import dataclass

from palimpsest.common.text import count
from palimpsest.services.rollout.engine.crash_evidence import ERROR

FRAMES = 5
"""Maximum number of stack frames in the text, the innermost first."""


@dataclass(frozen=True, slots=True)
class CrashEvidence:
    """The evidence about a dead engine."""

    doing: str
    """The engine's activity: `starting` or `serving`."""
    exit_code: int | None = None
    """Exit code of the engine's process; negative: the signal that ended it. None: unknown."""
    pid: int | None = None
    log: str = ""
    """Text that the engine's processes wrote to their file since they started."""
    path: str = ""
    """Path of that file."""
    silent: str = ""
    """The call that it did not answer, and the time limit after which the worker killed it; empty: it ended itself."""
    killed_for_memory: int = 0
    """Number of processes that the kernel has killed for lack of memory since the engine started."""


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
    "SIGSEGV": "a native library accessed memory outside its own",
    "SIGBUS": "memory that could not be allocated, most often because /dev/shm is full",
    "SIGABRT": "a native library aborted",
    "SIGKILL": "killed from outside: by the kernel when memory runs out, or by another process",
}
_TRY = {
    "SIGILL": "start again with --rollout.engine.amx=false. If it dies again, this CPU or the hypervisor lacks "
    "instructions that the engine needs (docs/installation.md names the supported CPUs): use another machine",
    "SIGSEGV": "start again; if it dies at the same place again, report that stack to vLLM, or try another model.path",
    "SIGBUS": "make room in /dev/shm (`df -h /dev/shm`; in a container: --shm-size)",
    "SIGABRT": "read the library's message at the end of the worker's log",
    "SIGKILL": "check whether memory ran out (`dmesg | grep -i oom`, the container's limit). If it did: a lower "
    "rollout.engine.kv_cache_gib, fewer workers (local.rollout_workers), or more memory",
}
_MEMORY = (
    "lower rollout.engine.kv_cache_gib (on a GPU rollout.engine.gpu_memory_utilization), start fewer workers "
    "(local.rollout_workers), or give the machine or the container more memory"
)
_UNKNOWN = "read the traceback in its log; if it does not concern this machine or this model, report it to vLLM"
_AGAIN = (
    "start again: the worker starts a new engine and samples the trajectories in flight again. If that step is "
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
"""Types of the errors that vLLM raises for a model or an option that it cannot serve; retrying does not help."""


def process_errors(log: str) -> list[ProcessError]:
    """Return the errors in the log, oldest first: the first one is the cause of the others."""
    return [ProcessError(**json.loads(line.removeprefix(ERROR))) for line in log.splitlines() if line.startswith(ERROR)]


def root_error(log: str) -> ProcessError | None:
    """Return the error that caused the others: the first with a type, else the first. None: the log has no error."""
    errors = process_errors(log)
    return next((error for error in errors if error.type), errors[0] if errors else None)


def refusal_error(evidence: CrashEvidence) -> ProcessError | None:
    """Return the error with which the engine refused the model or an option; another start would fail the same way."""
    failure = root_error(evidence.log)
    died = evidence.exit_code is not None and evidence.exit_code < 0
    if failure is None or died or evidence.doing != "starting" or re.search(_OF_ERRORS[0][0], str(failure)):
        return None
    return failure if failure.type in _REFUSING else None


def model_refusal_text(model: str, error: str) -> str:
    """Return the text for a model that vLLM refuses. `error`: its type and complete message."""
    return "\n".join([f"vLLM cannot serve the model {model}: {error}", *_advice(error)])


def step_refusal_text(what: str, error: str) -> str:
    """Return the text for a running engine that refused a step its worker needs. `error`: the complete message.

    >>> print(step_refusal_text("an update to version 3", "weight update: RuntimeError: CUDA out of memory"))
    the inference engine refused an update to version 3
    its error: weight update: RuntimeError: CUDA out of memory
    what to try: lower rollout.engine.kv_cache_gib (on a GPU rollout.engine.gpu_memory_utilization), start fewer \
workers (local.rollout_workers), or give the machine or the container more memory
    """
    advice = _advice(error) or [f"what to try: {_AGAIN}"]
    return "\n".join([f"the inference engine refused {what}", f"its error: {error}", *advice])


def crash_text(evidence: CrashEvidence) -> str:
    """Return the text for an engine that died. The first line names the cause; it is equal for equal causes."""
    failure, name = root_error(evidence.log), _signal_name(evidence.exit_code)
    died = name if name and not evidence.silent else ""
    lines = [f"the inference engine {_manner_of_death(evidence, failure, died)} while it was {evidence.doing}"]
    if evidence.killed_for_memory and died == "SIGKILL":
        killed = count(evidence.killed_for_memory, "process", "processes")
        lines.append(f"the kernel has killed {killed} for lack of memory since the engine started")
    if failure is not None:
        lines.append(f"its error: {failure}")
    lines += [f"it was in: {place}" for place in stack(evidence.log)[:1]]
    lines += [f"  called by {place}" for place in stack(evidence.log)[1:FRAMES]]
    if evidence.killed_for_memory and died == "SIGKILL":
        lines.append(f"what to try: {_MEMORY}")
    elif died in _TRY:
        lines.append(f"what to try: {_TRY[died]}")
    elif failure is not None:
        lines += _advice(str(failure)) or [f"what to try: {_UNKNOWN}"]
    facts = [f"pid {evidence.pid}"] if evidence.pid is not None else []
    facts += [f"exit code {evidence.exit_code}"] if evidence.exit_code is not None else []
    return "\n".join([*lines, f"its process: {', '.join(facts) or 'unknown'}; its log: {evidence.path}"])


def stack(log: str) -> list[str]:
    """Return the stack of the thread that died, as faulthandler wrote it: innermost first, with native frames if any.

    >>> stack('Fatal Python error: Aborted\\n\\nCurrent thread 0x01 (most recent call first):\\n'
    ...       '  File "/x/site-packages/vllm/ops.py", line 7 in attend\\n')
    ['vllm/ops.py:7 attend']
    """
    _, fatal, dump = log.rpartition("Fatal Python error: ")
    return list(_parse_frames(dump)) if fatal else []


def _parse_frames(dump: str) -> Iterator[str]:
    header = "Current thread" if "Current thread" in dump else "Thread"  # a thread that runs no Python is not listed
    inside = False
    for line in dump.splitlines():
        if "most recent call first" in line:
            inside = line.startswith(header)
        elif inside and (call := re.match(r'\s+File "(.+)", line (\d+) in (.+)', line)):
            yield f"{_short_path(call[1])}:{call[2]} {call[3]}"
        elif inside and (call := re.match(r'\s+Binary file "(.+)", at (.+)', line)):
            yield f"{call[1].rpartition('/')[2]}: {call[2]}"


def _short_path(path: str) -> str:
    """Return the path within site-packages; of other paths the last two parts."""
    _, installed, within = path.rpartition("site-packages/")
    return within if installed else "/".join(path.split("/")[-2:])


def _manner_of_death(evidence: CrashEvidence, failure: ProcessError | None, died: str) -> str:
    if evidence.silent:
        return f"did not answer ({evidence.silent}), so the worker killed it"
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
