"""Child processes of one machine's run: started, watched, started again when they crash, and gone when we are."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common.lifeline import on_parents_death
from common.refusal import ExitCode

STEADY_S = 60.0
"""A process that ran for so long has its earlier crashes forgiven."""


@dataclass(eq=False)
class Child:
    """One service's process."""

    name: str
    command: Sequence[str]
    log: Path
    process: "subprocess.Popen[bytes] | None" = None
    started: float = 0.0
    crashes: int = 0
    restarts: int = 0
    environment: dict[str, str] = field(default_factory=dict)

    def start(self) -> None:
        """Run it in a process group of its own, its output appended to the log."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
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

    def start_again(self) -> None:
        """After a crash."""
        self.kill_group()  # what the dead process left behind
        self.crashes = 1 if time.monotonic() - self.started > STEADY_S else self.crashes + 1
        self.restarts += 1
        self.start()

    def last_words(self, lines: int = 12) -> str:
        """The end of its log."""
        try:
            text = self.log.read_text(errors="replace")
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
