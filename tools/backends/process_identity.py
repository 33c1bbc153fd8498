"""Which process this is: a number alone does not say, because the kernel gives it again (Linux)."""

import contextlib
import os
import signal
import time
from pathlib import Path
from typing import Self

import msgspec

BOOT = Path("/proc/sys/kernel/random/boot_id")


class Identity(msgspec.Struct, frozen=True):
    """A process that no later one can be mistaken for.

    Its command line is no part of this: for a moment after a process was started the kernel has none to tell.
    """

    pid: int
    started: int
    """Clock ticks from the machine's start to the process's."""
    boot: str
    """This start of the machine."""

    @classmethod
    def of(cls, pid: int) -> Self | None:
        """The process that has this number now; None if there is none, or only what its parent has not yet seen end."""
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return None
        state, *others = stat[stat.rindex(")") + 2 :].split()  # the name before may hold anything
        if state in "ZX":
            return None
        return cls(pid=pid, started=int(others[18]), boot=BOOT.read_text().strip())

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """The process that was written here; None without such a file, or with one that was cut short."""
        try:
            return msgspec.json.decode(path.read_bytes(), type=cls)
        except (FileNotFoundError, msgspec.DecodeError):
            return None

    def write(self, path: Path) -> None:
        """Replace the file by one that says who this is."""
        partial = path.with_suffix(".partial")
        partial.write_bytes(msgspec.json.encode(self))
        partial.replace(path)

    @property
    def alive(self) -> bool:
        """Whether this very process lives."""
        return Identity.of(self.pid) == self

    def end(self, timeout_s: float = 30.0) -> None:
        """Ask it to end and wait for that; one that does not end is killed. Another with its number is left alone."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            self._signal(number)
            self._signal(signal.SIGCONT)
            deadline = time.monotonic() + timeout_s
            while self.alive and time.monotonic() < deadline:
                time.sleep(0.02)

    def _signal(self, number: signal.Signals) -> None:
        if self.alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)
