"""The services of one run as a person starts them on several machines: each by itself, nobody supervising."""

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
from tools.backends import ports  # those that no client is lent: a killed service comes back on its own

WITHIN_S = waiting.LIMIT_S
KEEP_ALL = "--learner.checkpoint.keep=1000"
"""So that nothing that a replaced learner stored would have gone by the time the test looks."""
Process = subprocess.Popen[bytes]


class Services:
    """The processes of one run, each started by hand."""

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
        """A service under this name."""
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
        """A learner of this run under this name."""
        self.ports[name] = ports.free()
        return self.start(name, "learner", f"--learner.port={self.ports[name]}", KEEP_ALL, *flags, fault=fault)

    def ranks(self, name: str, count: int, *, fault: str = "") -> Process:
        """A learner of several ranks, under torchrun."""
        self.ports[name] = ports.free()
        launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}")
        flags = (f"--learner.port={self.ports[name]}", KEEP_ALL)
        return self.start(name, "learner", *flags, fault=fault, launcher=launcher)

    def log(self, name: str) -> Path:
        return self.home.parent / f"{name}.log"

    def status(self, name: str) -> dict[str, Any]:
        """What it says of itself; {} while it does not answer."""
        try:
            found: dict[str, Any] = httpx.get(f"http://127.0.0.1:{self.ports[name]}/v1/status", timeout=5.0).json()
        except httpx.TransportError:
            return {}
        return found

    def until(self, what: Callable[[], bool], name: str) -> None:
        """Look until it holds."""
        waiting.until(what, name, tell=lambda: str({name: self._end_of_log(name) for name in self._started}))

    def kill(self, name: str) -> None:
        """SIGKILL it, and forget it: it may be started again under its name."""
        process = self._started.pop(name)
        process.kill()
        process.wait()

    def process(self, name: str) -> Process:
        """The one that was started last under this name."""
        return self._started[name]

    def died(self) -> dict[str, str]:
        """Who ended badly of itself, and the end of its log."""
        return {name: self._end_of_log(name) for name, process in self._started.items() if process.poll()}

    def forget(self, name: str) -> int:
        """Wait for the end of one that is to end; its exit code."""
        return self._started.pop(name).wait(timeout=WITHIN_S)

    def _end_of_log(self, name: str) -> str:
        return self.log(name).read_text()[-1500:]

    def end(self) -> None:
        for process in self._started.values():
            process.kill()
            process.wait()
