"""The services of one run as a person starts them on several machines: each by itself, nobody supervising."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import httpx

from common import faults
from services.local.supervisor import free_port
from tests.runs import ROOT

WITHIN_S = 240.0
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
        self.ports = {name: free_port("127.0.0.1") for name in ("snapshot_store", "env_gateway", "rollout")}
        self._toml = toml
        self._started: dict[str, Process] = {}

    def start(self, name: str, module: str, *flags: str, fault: str = "", launcher: Sequence[str] = ()) -> Process:
        """A service under this name."""
        common = [*self._flags, *(f"--{name}.port={self.ports[name]}" for name in ("snapshot_store", "env_gateway"))]
        with self.log(name).open("wb") as log:
            self._started[name] = subprocess.Popen(
                [sys.executable, *launcher, "-m", f"services.{module}", str(self._toml), *common, *flags],
                cwd=ROOT,
                env={**os.environ, **self._environment, faults.VARIABLE: fault},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        return self._started[name]

    def learner(self, name: str, *flags: str, fault: str = "") -> Process:
        """A learner of this run under this name."""
        self.ports[name] = free_port("127.0.0.1")
        return self.start(name, "learner", f"--learner.port={self.ports[name]}", KEEP_ALL, *flags, fault=fault)

    def ranks(self, name: str, count: int, *, fault: str = "") -> Process:
        """A learner of several ranks, under torchrun."""
        self.ports[name] = free_port("127.0.0.1")
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
        deadline = time.monotonic() + WITHIN_S
        while not what():
            if time.monotonic() > deadline:
                said = {name: self.log(name).read_text()[-1500:] for name in self._started}
                raise AssertionError(f"{name} did not come within {WITHIN_S:.0f} s: {said}")
            time.sleep(0.05)

    def end(self) -> None:
        for process in self._started.values():
            process.kill()
            process.wait()
