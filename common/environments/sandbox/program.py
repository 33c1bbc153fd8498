"""Runs one program of a model in a sandbox and returns what it printed.

The limits hold whatever the program does: its time ends by a kill of the sandbox's first process, with which the kernel
ends every process inside; output beyond the limit is read and dropped. A program cannot make this module raise: it
raises only if the sandbox itself fails, so that the session ends without a reward.
"""

import json
import os
import resource
import selectors
import signal
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass

from palimpsest.common.environments.sandbox.command import Tools, command
from palimpsest.common.user_error import UserError

OFF = (
    'it runs programs of the model, and env_gateway.code_tools is "off"; set env_gateway.code_tools = "bubblewrap" '
    "(docs/environment-limits.md)"
)
MIB = 2**20
START_LIMIT_S, END_LIMIT_S = 60.0, 30.0
"""Time limits of bubblewrap for the begin of the sandbox and for its end after a kill, in seconds."""
_READ = 65536
_tools: Tools | None = None


class SandboxOff(UserError):
    """This process may not run programs."""

    def __init__(self) -> None:
        super().__init__(OFF)


class SandboxFailed(Exception):
    """bubblewrap could not make the sandbox; the text has its reason."""


@dataclass(frozen=True, slots=True)
class ProgramResult:
    """What a program did."""

    stdout: str
    stderr: str
    exit_status: int | None
    """128 and the number of the signal that killed it. None: it was stopped at the time limit."""


@dataclass(frozen=True, slots=True)
class ProgramLimits:
    """Limits of one program."""

    time_s: float = 5.0
    memory_mib: int = 1024
    """Address space of one of its processes."""
    processes: int = 32
    """Processes and threads."""
    output_bytes: int = 16384
    """What is kept of each of the two outputs."""
    folder_mib: int = 64
    """Size of the folder that it works in, which is in memory."""


DEFAULT_LIMITS = ProgramLimits()


def permit(tools: Tools | None) -> None:
    """Let this process and its later children run programs in a sandbox; None: forbid it."""
    global _tools
    _tools = tools


def permitted() -> bool:
    """Whether this process may run programs."""
    return _tools is not None


def run_program(source: str, limits: ProgramLimits = DEFAULT_LIMITS) -> ProgramResult:
    """Run a Python program in a sandbox, in an empty folder. Raises SandboxOff, SandboxFailed."""
    if _tools is None:
        raise SandboxOff
    text = os.memfd_create("program")
    status, reports = os.pipe()
    try:
        with os.fdopen(text, "wb", closefd=False) as file:
            file.write(source.encode(errors="replace"))
        os.lseek(text, 0, os.SEEK_SET)
        process = subprocess.Popen(
            command(_tools, _rlimits(limits), source=text, status=reports, folder_bytes=limits.folder_mib * MIB),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=(text, reports),
            env={},
        )
    except OSError as error:
        os.close(status)
        raise SandboxFailed(f"bubblewrap cannot be started: {error}") from None
    finally:
        os.close(text)
        os.close(reports)
    with os.fdopen(status, "rb", buffering=0), process:
        return _watch(process, status, limits)


def _rlimits(limits: ProgramLimits) -> dict[str, int]:
    """Return name and value of each limit: at most that of this process, which a program cannot raise."""
    wanted = {"RLIMIT_AS": limits.memory_mib * MIB, "RLIMIT_NPROC": limits.processes, "RLIMIT_CORE": 0}
    own = {name: resource.getrlimit(getattr(resource, name))[1] for name in wanted}
    return {
        name: most if own[name] == resource.RLIM_INFINITY else min(most, own[name]) for name, most in wanted.items()
    }


def _watch(process: subprocess.Popen[bytes], status: int, limits: ProgramLimits) -> ProgramResult:
    """Read the outputs until the sandbox is gone, and end it at its time limit. Raises SandboxFailed."""
    assert process.stdout is not None
    assert process.stderr is not None
    out, err = process.stdout.fileno(), process.stderr.fileno()
    outputs = {
        out: _BoundedOutput(limits.output_bytes),
        err: _BoundedOutput(limits.output_bytes),
        status: _BoundedOutput(_READ),
    }
    try:
        stopped = _read(process, outputs, status, limits.time_s)
    finally:
        first = _reports(outputs[status]).get("child-pid")
        _kill(process, first)
        process.wait()
        if first is not None:
            with suppress(ChildProcessError):  # where this process adopts no orphans
                os.waitpid(first, 0)
    code = _reports(outputs[status]).get("exit-code")
    if code is None and not stopped:
        raise SandboxFailed(f"bubblewrap could not run the program: {outputs[err].text().strip() or 'it was killed'}")
    return ProgramResult(outputs[out].text(), outputs[err].text(), None if stopped else code)


def _read(process: subprocess.Popen[bytes], outputs: dict[int, "_BoundedOutput"], status: int, time_s: float) -> bool:
    """Read until all outputs end. Return whether the time limit ended the sandbox. Raises SandboxFailed."""
    first, stopped, deadline = None, False, time.monotonic() + START_LIMIT_S
    with selectors.DefaultSelector() as selector:
        for descriptor in outputs:
            selector.register(descriptor, selectors.EVENT_READ)
        while selector.get_map():
            left = deadline - time.monotonic()
            if left <= 0 and (first is None or stopped):
                raise SandboxFailed(f"bubblewrap does not {'end' if stopped else 'begin'}")
            if left <= 0:
                _kill(process, first)
                stopped, deadline = True, time.monotonic() + END_LIMIT_S
                continue
            for key, _ in selector.select(left):
                read = os.read(key.fd, _READ)
                outputs[key.fd].add(read)
                if not read:
                    selector.unregister(key.fd)
            if first is None and (first := _reports(outputs[status]).get("child-pid")) is not None:
                deadline = time.monotonic() + time_s  # its clock does not include the start of bubblewrap
    return stopped


class _BoundedOutput:
    """The beginning of an output, and its length."""

    def __init__(self, most: int) -> None:
        self.kept, self._length, self._most = bytearray(), 0, most

    def add(self, read: bytes) -> None:
        self._length += len(read)
        self.kept += read[: max(0, self._most - len(self.kept))]

    def text(self) -> str:
        text = self.kept.decode(errors="replace")
        note = f"\n[truncated: the first {self._most} of {self._length} bytes]"
        return text if self._length <= self._most else text + note


def _reports(status: _BoundedOutput) -> dict[str, int]:
    """Return what bubblewrap reported: `child-pid` once the sandbox began, `exit-code` once its program ended."""
    found: dict[str, int] = {}
    for line in status.kept.splitlines():
        with suppress(ValueError):
            found.update({key: value for key, value in json.loads(line).items() if isinstance(value, int)})
    return found


def _kill(process: subprocess.Popen[bytes], first: int | None) -> None:
    """Kill the sandbox if it runs. first: the first process inside, whose end is the end of all; None: not known."""
    if process.poll() is None:  # so its child `first` was not collected either
        if first is None:
            process.kill()
        else:
            with suppress(ProcessLookupError):
                os.kill(first, signal.SIGKILL)
