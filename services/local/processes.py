"""Child processes of a run on one machine. They end when this process ends."""

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
from palimpsest.common.secret_variables import without_our_secrets
from palimpsest.common.user_error import ExitCode

MOST_READ = 1 << 16
"""Number of bytes read from the end of a log."""


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
    """Variables that differ from this process's."""
    secrets: tuple[str, ...] = ()
    """Prefixes of the secret variables that it receives."""
    scratch: Path | None = None
    """A folder that the process needs only while it runs; it is deleted afterward."""
    _log_begins: int = 0
    """Size of the log at the newest start, in bytes."""

    def start(self) -> None:
        """Start the process in its own process group and append its output to the log. Kills an earlier group first."""
        self.kill_group()
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self._log_begins = log.tell()
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**without_our_secrets(os.environ, keep=self.secrets), **self.environment},
                start_new_session=True,  # Ctrl-C reaches only the supervisor, which stops the children
                preexec_fn=_die_with_parent,
            )
        self.started = time.monotonic()
        self.starts += 1

    @property
    def running(self) -> bool:
        """Whether the process is alive."""
        return self.process is not None and self.process.poll() is None

    @property
    def exit_code(self) -> int | None:
        """The exit code; negative for a signal, None while the process is alive or before its start."""
        return self.process.poll() if self.process is not None else None

    def terminate(self) -> None:
        """Send SIGTERM."""
        if self.process is not None and self.running:
            self.process.terminate()

    def kill_group(self) -> None:
        """Kill the process and everything it started (torchrun's ranks, the engine's workers)."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=10)
        if self.scratch is not None:
            shutil.rmtree(self.scratch, ignore_errors=True)

    def last_words(self, lines: int = 12) -> str:
        """Return the last lines of the log since the newest start."""
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
"""Exit codes after which another start would fail in the same way."""


def python(*arguments: str) -> list[str]:
    """Return a command of this interpreter."""
    return [sys.executable, *arguments]


def _die_with_parent() -> None:
    """Make the kernel send SIGTERM to the child when this process ends. Runs in the child before its program."""
    on_parents_death(signal.SIGTERM)
