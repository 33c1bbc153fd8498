"""Watches the processes of a vLLM engine and collects evidence if they die."""

import ast
import asyncio
import contextlib
import os
import re
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from palimpsest.common.secret_variables import without_our_secrets
from palimpsest.services.rollout.engine import oom_kills
from palimpsest.services.rollout.engine.crash_evidence import VARIABLE
from palimpsest.services.rollout.engine.crash_report import CrashEvidence

EXIT_S = 10.0
"""Time limit for a process to exit after it announced its end or received a signal, in seconds."""
_FAILED_TO_START = re.compile(r"Failed core proc\(s\): (\{.*?\})")
"""Part of vLLM's error if an engine process ended before it was ready: process names and exit codes."""


class EngineMonitor:
    """Monitors one engine, from before its processes start. `log`: the crash log of its processes."""

    def __init__(self, log: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log
        self._already = log.stat().st_size if log.exists() else 0
        self._counter = oom_kills.find_counter()
        self._killed = oom_kills.read_count(self._counter)
        self._processes: Sequence[BaseProcess] = ()
        self._silent = ""
        self.doing = "starting"
        """The engine's activity for error texts: `starting`, then `serving`."""
        self.gone = asyncio.Event()
        """One of the processes has ended."""

    @contextlib.contextmanager
    def child_variables(self) -> Iterator[None]:
        """Pass the path of the crash log, and none of our secrets, to processes that start inside the block."""
        before = dict(os.environ)
        changes = {VARIABLE: str(self._log.absolute()), "PYTHONFAULTHANDLER": "1"}
        secrets = before.keys() - without_our_secrets(before).keys()
        for name in secrets:
            del os.environ[name]
        os.environ.update(changes)
        try:
            yield
        finally:
            for name in changes.keys() - before.keys():
                del os.environ[name]
            os.environ.update({name: before[name] for name in before.keys() & (changes.keys() | secrets)})

    def watch(self, processes: Sequence[BaseProcess]) -> None:
        """Set `gone` when one of these processes ends."""
        self._processes = processes
        loop = asyncio.get_running_loop()

        def wait() -> None:
            connection.wait([process.sentinel for process in processes])
            with contextlib.suppress(RuntimeError):  # the event loop may be closed by then
                loop.call_soon_threadsafe(self.gone.set)

        threading.Thread(target=wait, name="engine-watch", daemon=True).start()

    def kill(self, silent: str) -> None:
        """Kill an engine that does not answer. SIGABRT makes it write its stack. `silent`: the unanswered call."""
        self._silent = silent
        for process in self._processes:
            if process.pid is not None and process.is_alive():
                os.kill(process.pid, signal.SIGABRT)

    def collect_evidence(self) -> CrashEvidence:
        """Return the evidence of a dead engine. Blocks until its processes exit, and kills those that do not."""
        ended = [process for process in self._processes if _join(process)]
        if not self._silent and len(ended) < len(self._processes):
            self.kill("it announced its end and did not exit")
            ended = [process for process in self._processes if _join(process)]
        first = next((process for process in ended if process.exitcode), ended[0] if ended else None)
        return self._evidence(first.exitcode if first else None, first.pid if first else None)

    def failed_start_evidence(self, error: BaseException) -> CrashEvidence | None:
        """Return the evidence of an engine that died before it was ready. None: no process of it ended."""
        named = _FAILED_TO_START.search(str(error))
        if named is None:
            return None
        codes = ast.literal_eval(named[1]).values()
        return self._evidence(next((code for code in codes if code), None), None)

    def _evidence(self, exit_code: int | None, pid: int | None) -> CrashEvidence:
        try:
            with self._log.open("rb") as file:
                file.seek(self._already)
                log = file.read().decode(errors="replace")
        except OSError:
            log = ""
        killed = max(0, oom_kills.read_count(self._counter) - self._killed)
        return CrashEvidence(self.doing, exit_code, pid, log, str(self._log), self._silent, killed)


def _join(process: BaseProcess) -> bool:
    """Wait until the process ends and its exit code is set; another thread (vLLM's) may collect the code."""
    deadline = time.monotonic() + EXIT_S
    while process.exitcode is None and (left := deadline - time.monotonic()) > 0:
        process.join(min(left, 0.1))
    return process.exitcode is not None
