"""Identity of a process (Linux). A PID alone is not enough, because the kernel reuses PIDs."""

import contextlib
import os
import signal
import time
from pathlib import Path
from typing import Self

import msgspec

from palimpsest.common.boot_clock import boot_id
from palimpsest.common.proc_stat import stat_fields


class Identity(msgspec.Struct, frozen=True):
    """PID, start time and boot id: unique over restarts of the machine.

    The command line is not included, because /proc has none for a moment after the start of a process.
    """

    pid: int
    started: int
    """Start time of the process, in clock ticks since boot."""
    boot: str
    """Boot id of the machine."""

    @classmethod
    def of(cls, pid: int) -> Self | None:
        """Return the running process with this PID, or None if there is none or it is a zombie."""
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return None
        state, *others = stat_fields(stat)
        if state in "ZX":
            return None
        return cls(pid=pid, started=int(others[18]), boot=boot_id())

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """Return the identity in this file, or None if the file is missing or incomplete."""
        try:
            return msgspec.json.decode(path.read_bytes(), type=cls)
        except (FileNotFoundError, msgspec.DecodeError):
            return None

    def write(self, path: Path) -> None:
        """Write the identity to this file, atomically."""
        partial = path.with_suffix(".partial")
        partial.write_bytes(msgspec.json.encode(self))
        partial.replace(path)

    @property
    def alive(self) -> bool:
        """Whether this process runs."""
        return Identity.of(self.pid) == self

    def end(self, timeout_s: float = 30.0) -> None:
        """Send SIGTERM and wait, then SIGKILL. Never signals another process with the same PID."""
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
