"""Services of one run, started one by one and without a supervisor, as on several machines."""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import httpx

from palimpsest.common import failpoints
from tests.processes import waiting
from tests.runs.run_process import ROOT
from tools.backends import ports  # ports outside the ephemeral range, so a restarted service gets its port again

WITHIN_S = waiting.LIMIT_S
KEEP_ALL = "--learner.checkpoint.keep=1000"
"""Keep all checkpoints, so that the test finds everything that a replaced learner stored."""
Process = subprocess.Popen[bytes]


class Services:
    """Processes of one run, each started by the test."""

    def __init__(
        self, toml: Path, home: Path, *flags: str, environment: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        self.home = home
        self._flags, self._environment = flags, environment
        self.ports = {name: ports.free() for name in ("snapshot_store", "env_gateway", "rollout")}
        self._toml = toml
        self._started: dict[str, Process] = {}
        home.parent.mkdir(parents=True, exist_ok=True)

    def start(self, name: str, module: str, *flags: str, fault: str = "", launcher: Sequence[str] = ()) -> Process:
        """Start a service under this name."""
        common = [*self._flags, *(f"--{name}.port={self.ports[name]}" for name in ("snapshot_store", "env_gateway"))]
        with self.log(name).open("ab") as log:
            self._started[name] = subprocess.Popen(
                [sys.executable, *launcher, "-m", f"palimpsest.services.{module}", str(self._toml), *common, *flags],
                cwd=ROOT,
                env={**os.environ, **self._environment, failpoints.VARIABLE: fault},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        return self._started[name]

    def learner(self, name: str, *flags: str, fault: str = "") -> Process:
        """Start a learner under this name."""
        self.ports[name] = ports.free()
        return self.start(name, "learner", f"--learner.port={self.ports[name]}", KEEP_ALL, *flags, fault=fault)

    def ranks(self, name: str, count: int, *flags: str, fault: str = "") -> Process:
        """Start a learner of several ranks under torchrun."""
        self.ports[name] = ports.free()
        launcher = ("-m", "palimpsest.services.learner.torchrun", "--standalone", f"--nproc-per-node={count}")
        own = (f"--learner.port={self.ports[name]}", KEEP_ALL)
        return self.start(name, "learner", *own, *flags, fault=fault, launcher=launcher)

    def nodes(self, names: Sequence[str], flags: Mapping[str, Sequence[str]] = MappingProxyType({})) -> None:
        """Start a learner of one rank a node, with the launcher's arguments that the chart renders.

        flags: node -> flags of this node only.
        """
        learner, rendezvous = ports.free(), ports.free()
        for node, name in enumerate(names):
            self.ports[name] = learner
            launcher = (
                *("-m", "palimpsest.services.learner.torchrun", f"--nnodes={len(names)}", f"--node-rank={node}"),
                *("--master-addr=127.0.0.1", f"--master-port={rendezvous}", "--nproc-per-node=1"),
            )
            own = flags.get(name, ())
            self.start(name, "learner", f"--learner.port={learner}", KEEP_ALL, *own, launcher=launcher)

    def restarting(
        self,
        names: Sequence[str],
        *,
        nodes: str = "2",
        store_type: str = "tcp",
        restarts: int = 3,
        fault: str = "",
        flags: Mapping[str, Sequence[str]] = MappingProxyType({}),
    ) -> Callable[[str], None]:
        """Start a learner of one rank a node, whose launchers start the ranks again. The first node serves the
        rendezvous over TCP. Return a function that starts the launcher of a further node.

        nodes: of --nnodes. flags: node -> flags of this node only.
        """
        learner, file = ports.free(), self.home.parent / "rendezvous"
        endpoint = f"127.0.0.1:{ports.free()}" if store_type == "tcp" else str(file)

        def join(name: str) -> None:
            self.ports[name] = learner
            conf = f"store_type={store_type},is_host={int(name == names[0])},last_call_timeout=2"
            launcher = (
                *("-m", "palimpsest.services.learner.torchrun", f"--nnodes={nodes}", "--nproc-per-node=1"),
                *("--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}", "--rdzv-id=test", f"--rdzv-conf={conf}"),
                f"--max-restarts={restarts}",
            )
            own = flags.get(name, ())
            self.start(name, "learner", f"--learner.port={learner}", KEEP_ALL, *own, launcher=launcher, fault=fault)

        for name in names:
            join(name)
        return join

    def log(self, name: str) -> Path:
        return self.home.parent / f"{name}.log"

    def status(self, name: str) -> dict[str, Any]:
        """Status of the service; {} if it does not answer."""
        try:
            found: dict[str, Any] = httpx.get(f"http://127.0.0.1:{self.ports[name]}/v1/status", timeout=5.0).json()
        except httpx.TransportError:
            return {}
        return found

    def until(self, what: Callable[[], bool], name: str) -> None:
        """Wait until what() is true."""
        waiting.until(what, name, tell=lambda: str({name: self._end_of_log(name) for name in self._started}))

    def kill(self, name: str) -> None:
        """SIGKILL the process and remove it, so that it can be started again under its name."""
        process = self._started.pop(name)
        process.kill()
        process.wait()

    def process(self, name: str) -> Process:
        """The process started last under this name."""
        return self._started[name]

    def died(self) -> dict[str, str]:
        """Name -> end of the log, for services that ended with an error."""
        return {name: self._end_of_log(name) for name, process in self._started.items() if process.poll()}

    def forget(self, name: str) -> int:
        """Wait for the end of a process and remove it. Returns its exit code."""
        return self._started.pop(name).wait(timeout=WITHIN_S)

    def _end_of_log(self, name: str) -> str:
        return self.log(name).read_text()[-1500:]

    def end(self) -> None:
        for process in self._started.values():
            process.kill()
            process.wait()
