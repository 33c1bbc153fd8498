"""Starts, stops, kills and pauses a server process."""

import contextlib
import os
import signal
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

from palimpsest.common.parent_death import die_with_parent
from palimpsest.common.user_error import ExitCode, UserError
from tools.backends import ports
from tools.backends.cache import Say
from tools.backends.process_identity import Identity
from tools.backends.recovery import LogRecovery, ProgressLimit

LAST_LINES = 15
POLL_S = 0.05
REPORT_EVERY_S = 5.0

_starter = ThreadPoolExecutor(max_workers=1, thread_name_prefix="starter")
"""Starts every server. With PR_SET_PDEATHSIG the kernel kills a child when the *thread* that started it ends: this one
runs until exit. KeyboardInterrupt is not raised in it, so the process object of a started server is never lost."""


class Server(ABC):
    """A server with data, log and process record in one folder.

    A restart on the same folder uses the same port. The server ends with this process unless it is `detached`.
    """

    title: str
    """Name in messages."""

    def __init__(self, folder: Path, port: int | None, *, detached: bool = False) -> None:
        self.folder = folder.absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.port = port or ports.remembered(self.folder / "port") or ports.free()
        self.detached = detached
        self.process: subprocess.Popen[bytes] | None = None
        self.clock: Callable[[], float] = time.monotonic

    @abstractmethod
    def prepare(self) -> None:
        """Write the files that the process reads. Called at every start."""

    @abstractmethod
    def command(self) -> list[str]:
        """Return the command line of the process."""

    @abstractmethod
    def answers(self) -> bool:
        """Return whether the server serves requests, within two seconds."""

    def environment(self) -> Mapping[str, str]:
        """Return environment variables to add for the process."""
        return {}

    @property
    def log(self) -> Path:
        """Output of the process, over all starts."""
        return self.folder / f"{self.title.lower()}.log"

    @property
    def record(self) -> Path:
        """File with the identity of the process, for later commands."""
        return self.folder / "process.json"

    @property
    def running(self) -> bool:
        """Whether the process that this object started runs."""
        return self.process is not None and self.process.poll() is None

    def start(self, limit_s: float = 60.0, say: Say = lambda _: None) -> None:
        """Start the server and wait until it serves requests. Reports a long recovery to `say`.

        Raises UserError with the end of the log if the process ends, or makes no progress for `limit_s` seconds. The
        process is then killed.
        """
        assert not self.running, f"{self.title} runs already"
        if not ports.is_free(self.port):
            raise UserError(
                f"{self.title} cannot start: port {self.port} of {ports.HOST} is in use; end the program "
                f"that listens there, or name another port",
                ExitCode.UNAVAILABLE,
            )
        (self.folder / "port").write_text(f"{self.port}\n")
        self.prepare()
        command, environment = self.command(), {**os.environ, **self.environment()}
        begin = self.log.stat().st_size if self.log.exists() else 0
        started = _starter.submit(self._run, command, environment)
        try:
            started.result()
            self._wait(limit_s, say, begin)
        except BaseException:
            started.result()
            self.kill()
            raise

    def stop(self, timeout_s: float = 30.0) -> None:
        """Send SIGTERM and wait. Kill the process if it does not end within `timeout_s`."""
        if (process := self.process) is None:
            return
        self._signal(signal.SIGTERM)
        self._signal(signal.SIGCONT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout_s)
        self.kill()

    def kill(self) -> None:
        """Kill the process, as a crash does."""
        if self.process is not None:
            self._signal(signal.SIGKILL)
            self.process.wait()
            self.process = None
        self.record.unlink(missing_ok=True)

    def pause(self) -> None:
        """Suspend the process. Its connections stay open and get no answer."""
        self._signal(signal.SIGSTOP)
        if self.process is not None:  # wait until all threads stop; WNOWAIT keeps an exit status for `running`
            os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def resume(self) -> None:
        """Undo `pause`."""
        self._signal(signal.SIGCONT)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _run(self, command: list[str], environment: Mapping[str, str]) -> None:
        parent = os.getpid()
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,  # Ctrl-C must not reach the server
                preexec_fn=None if self.detached else lambda: die_with_parent(parent),
            )
        if self.detached and (identity := Identity.of(self.process.pid)) is not None:
            identity.write(self.record)

    def _wait(self, limit_s: float, say: Say, begin: int) -> None:
        """Wait until the server answers. begin: offset in the log file where this start begins."""
        recovery, limit, reported = LogRecovery(), ProgressLimit(limit_s, self.clock()), self.clock()
        with self.log.open(errors="replace") as log:
            log.seek(begin)
            rest = ""
            while not self.answers():
                if not self.running:
                    assert self.process is not None
                    raise UserError(
                        f"{self.title} ended with {self.process.returncode} {self._log_tail()}", ExitCode.UNAVAILABLE
                    )
                *lines, rest = (rest + log.read()).split("\n")
                for line in lines:
                    recovery.read(line)
                if limit.ended(recovery.steps, self.clock()):
                    raise UserError(self._no_progress(limit_s, recovery), ExitCode.UNAVAILABLE)
                if recovery.progress and self.clock() - reported > REPORT_EVERY_S:
                    reported = self.clock()
                    say(f"{self.title} recovers its log: {recovery.progress}")
                time.sleep(POLL_S)

    def _no_progress(self, limit_s: float, recovery: LogRecovery) -> str:
        done = f" (it has recovered {recovery.progress} of its log)" if recovery.progress else ""
        return (
            f"{self.title} does not answer on port {self.port} and made no progress for {limit_s:g} s{done}; it was "
            f"killed {self._log_tail()}"
        )

    def _log_tail(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()[-LAST_LINES:]
        return f"(its log is {self.log}); the log's end:\n  " + "\n  ".join(lines)

    def _signal(self, number: signal.Signals) -> None:
        if self.running:
            assert self.process is not None
            self.process.send_signal(number)
