"""Child processes of one machine's run: started, watched, started again when they crash, and gone when we are."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from palimpsest.common.parent_death import on_parents_death
from palimpsest.common.user_error import ExitCode

MOST_READ = 1 << 16
"""Bytes of a log's end that are read for a process's last words."""


@dataclass(eq=False)
class Child:
    """One service's process."""

    name: str
    command: Sequence[str]
    log: Path
    process: "subprocess.Popen[bytes] | None" = None
    started: float = 0.0
    """time.monotonic() of its newest start."""
    starts: int = 0
    environment: dict[str, str] = field(default_factory=dict)
    scratch: Path | None = None
    """A folder that is only of use while it runs; removed with what it leaves."""
    _log_begins: int = 0
    """Bytes that its earlier starts, or an earlier supervisor's, have left in the log."""

    def start(self) -> None:
        """Run it in a process group of its own, its output appended to the log. What an earlier start left is ended."""
        self.kill_group()
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self._log_begins = log.tell()
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **self.environment},
                start_new_session=True,  # Ctrl-C is ours to hand on
                preexec_fn=_die_with_parent,
            )
        self.started = time.monotonic()
        self.starts += 1

    @property
    def running(self) -> bool:
        """Whether the process lives."""
        return self.process is not None and self.process.poll() is None

    @property
    def exit_code(self) -> int | None:
        """How it ended; negative for a signal, None while it lives or was never started."""
        return self.process.poll() if self.process is not None else None

    def terminate(self) -> None:
        """Ask it to stop."""
        if self.process is not None and self.running:
            self.process.terminate()

    def kill_group(self) -> None:
        """End it and everything it started (torchrun's ranks, the engine's workers)."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=10)
        if self.scratch is not None:
            shutil.rmtree(self.scratch, ignore_errors=True)

    def last_words(self, lines: int = 12) -> str:
        """The end of what this start of it has written."""
        try:
            with self.log.open("rb") as log:
                end = log.seek(0, os.SEEK_END)
                log.seek(max(self._log_begins, end - MOST_READ))
                text = log.read().decode(errors="replace")
        except OSError:
            return ""
        return "\n".join(text.strip().splitlines()[-lines:])


HOPELESS = frozenset(
    map(
        int,
        (ExitCode.CONFIGURATION, ExitCode.UNAVAILABLE, ExitCode.DAMAGED, ExitCode.CANARY, ExitCode.REPLACED),
    )
)
"""Exit codes after which starting again would end the same way."""


def python(*arguments: str) -> list[str]:
    """A command of this interpreter."""
    return [sys.executable, *arguments]


def _die_with_parent() -> None:
    """Runs in the child before its program: when this process is gone, however it went, the child is asked to stop."""
    on_parents_death(signal.SIGTERM)
