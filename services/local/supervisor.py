"""Everything on one machine: the services as processes, supervised until the run is done or stopped."""

import json
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from common.config.schema import RunConfig
from common.refusal import ExitCode, Refusal
from common.service import Stop
from services.local.processes import HOPELESS, Child, python

LOOK_S = 0.5
DRAIN_S = 25.0
"""Services get so long to stop cleanly."""
FOLLOW_S = 10.0
"""The learner is gone so long, at most, after a worker or replica that ended because the run did."""
LEARNER = "learner"
_ERROR = re.compile(r"[A-Za-z_][\w.]*(Error|Exception|Failed)\b")


def addressed(config: RunConfig) -> tuple[RunConfig, list[str]]:
    """The run with free ports in place of 0, and the flags that say so to every service."""
    flags = [f"--run.id={config.run.id}", f"--run.folder={config.run.folder}"]
    sections = {}
    for name in ("snapshot_store", "env_gateway", LEARNER):
        section = getattr(config, name)
        port = section.port or free_port(section.host)
        sections[name] = section.model_copy(update={"port": port})
        flags.append(f"--{name}.port={port}")
    return config.model_copy(update=sections), flags


def free_port(host: str) -> int:
    """A port that nobody listens on at this moment."""
    with closing(socket.socket()) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True, slots=True)
class Crash:
    """A process that ended of itself and was started again."""

    name: str
    at: float
    """time.monotonic() when it was noticed."""
    exit_code: int
    """Negative: the signal that ended it."""
    words: str
    """What its log says of it, in one line."""


class Local:
    """The processes of one run."""

    def __init__(self, config: RunConfig, source: Path, flags: list[str]) -> None:
        self._config = config
        self.home = config.run.home
        self.crashes: list[Crash] = []
        """Those that were followed by a new start."""
        self._ended: dict[Child, float] = {}
        self.learner = self._learner(source, flags)
        self.workers = list(self._workers(source, flags))
        self.replicas = list(self._replicas(source, flags))
        self.servers = [
            self._child("snapshot_store", python("-m", "services.snapshot_store", str(source), *flags)),
            self._child("env_gateway", python("-m", "services.env_gateway", str(source), *flags)),
        ]
        self.urls = {
            "snapshot_store": config.store_url,
            "env_gateway": config.gateway_url,
            LEARNER: f"http://{config.learner.host}:{config.learner.port}",
        } | {child.name: f"http://{config.rollout.host}:{port}" for child, port in self._worker_ports.items()}
        self.replica_urls = {
            child.name: f"http://{config.replica.host}:{port}" for child, port in self._replica_ports.items()
        }

    @property
    def children(self) -> list[Child]:
        """Every process, in the order they start in."""
        return [*self.servers, *self.workers, *self.replicas, self.learner]

    def run(self, stop: Stop, look: Callable[[], None]) -> bool:
        """Until the learner is done (True) or a stop is asked for (False). `look` is called twice a second.

        Raises Refusal when a process cannot be kept alive.
        """
        for child in self.children:
            child.start()
        try:
            while not stop.wait(LOOK_S):
                look()
                if not self.learner.running and self.learner.exit_code == 0:
                    return True
                for child in self.children:
                    if not child.running and not self._may_be_done(child):
                        self._crashed(child)
            return False
        finally:
            self._stop()

    def _may_be_done(self, child: Child) -> bool:
        """A worker or replica that ended well: they hear of the run's end before the learner's process has gone."""
        if child not in (*self.workers, *self.replicas) or child.exit_code != 0:
            return False
        ended = self._ended.setdefault(child, time.monotonic())
        return time.monotonic() - ended < FOLLOW_S

    def _crashed(self, child: Child) -> None:
        code = child.exit_code
        refusal = _refusal(self.home, child)
        if code in HOPELESS or (refusal is not None and refusal[1] in HOPELESS):
            message, code = refusal or (child.last_words(), code or 1)
            raise Refusal(f"{child.name}: {message}\nits log: {child.log}", ExitCode(code))
        if child.crashes >= self._config.local.restarts:
            raise Refusal(
                f"{child.name} crashed {child.crashes + 1} times in a row (local.restarts); the last time it said:\n"
                f"{child.last_words()}\nits log: {child.log}",
                ExitCode.CRASHED,
            )
        self.crashes.append(Crash(child.name, time.monotonic(), code or 0, last_error(child.last_words(60))))
        self._ended.pop(child, None)
        child.start_again()

    def _stop(self) -> None:
        """Workers, replicas and learner first: what they finish still needs the servers."""
        for group in ([*self.workers, *self.replicas, self.learner], self.servers):
            for child in group:
                child.terminate()
            deadline = time.monotonic() + DRAIN_S
            while any(child.running for child in group) and time.monotonic() < deadline:
                time.sleep(0.05)
            for child in group:
                child.kill_group()

    def _learner(self, source: Path, flags: list[str]) -> Child:
        ranks = self._config.local.learner_ranks
        launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}")
        return self._child(LEARNER, python(*launcher, "-m", "services.learner", str(source), *flags))

    def _workers(self, source: Path, flags: list[str]) -> Iterator[Child]:
        self._worker_ports: dict[Child, int] = {}
        for i in range(self._config.local.rollout_workers):
            name, port = f"worker-{i}", free_port(self._config.rollout.host)
            own = [f"--rollout.worker={name}", f"--rollout.port={port}"]
            child = self._child(name, python("-m", "services.rollout", str(source), *flags, *own))
            self._worker_ports[child] = port
            yield child

    def _replicas(self, source: Path, flags: list[str]) -> Iterator[Child]:
        self._replica_ports: dict[Child, int] = {}
        wanted = max(1, self._config.local.replicas) if self._config.learner.proximal.kind == "replica" else 0
        for i in range(wanted):
            name, port = f"replica-{i}", free_port(self._config.replica.host)
            own = [f"--replica.name={name}", f"--replica.port={port}"]
            child = self._child(name, python("-m", "services.learner.replica", str(source), *flags, *own))
            self._replica_ports[child] = port
            yield child

    def _child(self, name: str, command: list[str]) -> Child:
        (self.home / "refusals" / f"{name}.json").unlink(missing_ok=True)
        return Child(name, command, self.home / "logs" / f"{name}.log")


def last_error(words: str) -> str:
    """The line of a log's end that says what went wrong: the last error, else the last line.

    torchrun ends with a report of its own, under its own error; what the rank said stands above it.

    >>> last_error("Traceback:\\nValueError: no\\nx.ChildFailedError: \\n====")
    'ValueError: no'
    """
    lines = [line.strip() for line in words.splitlines() if any(map(str.isalnum, line))]
    errors = [line for line in lines if _ERROR.match(line) and "ChildFailedError" not in line]
    reported = [line for line in lines if line.startswith("traceback :") and "received by PID" in line]
    return (errors or [line.removeprefix("traceback :").strip() for line in reported] or lines or [""])[-1]


def _refusal(home: Path, child: Child) -> tuple[str, int] | None:
    """What this process, or one that it launched, refused, as common/program.py leaves it.

    torchrun would swallow the exit code.
    """
    try:
        said = json.loads((home / "refusals" / f"{child.name}.json").read_text())
    except (OSError, ValueError):
        return None
    if child.process is None or child.process.pid not in said["processes"]:
        return None
    return str(said["message"]), int(said["code"])
