"""The snapshot store for tests: served in this process, or in a separate process that can restart."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

import httpx

from palimpsest.common.service import Server
from palimpsest.common.snapshots.client import SnapshotClient
from palimpsest.common.snapshots.writer import Writer
from palimpsest.services.snapshot_store.app import CLAIMS_KEEP_S, create_app
from palimpsest.services.snapshot_store.storage import Storage
from palimpsest.services.snapshot_store.storage_disk import DiskStorage
from tests.processes.waiting import LIMIT_S
from tests.runs.run_process import ROOT
from tools.backends.ports import free


def eventually(holds: Callable[[], bool]) -> None:
    """Wait until holds() is true."""
    deadline = time.monotonic() + LIMIT_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class ServedStore(Server):
    """The store's application in this process, for tests that never kill it. Use as a context manager."""

    def __init__(self, storage: Storage, *, sweep_s: float, claims_keep_s: float = CLAIMS_KEEP_S) -> None:
        app = create_app(storage, sweep_s=sweep_s, claims_keep_s=claims_keep_s)
        super().__init__(app, "127.0.0.1", 0, key="snapshot_store")
        self.url = f"http://127.0.0.1:{self.port}"

    def metric(self, name: str) -> float:
        """Current value of palimpsest_store_`name`, over all stores of this process."""
        return metric_of(self.url, name)


class FolderStore(ServedStore):
    """Served store over a folder."""

    def __init__(self, folder: Path, *, sweep_s: float) -> None:
        super().__init__(DiskStorage(folder), sweep_s=sweep_s)
        self.folder = folder

    def objects(self) -> dict[str, int]:
        """Files below objects/, including hidden ones -> size in bytes."""
        return {path.name: path.stat().st_size for path in self.folder.glob("objects/*")}


@contextmanager
def written_store(folder: Path) -> Iterator[FolderStore]:
    """Serve an empty store over a folder, with writer 1."""
    with FolderStore(folder, sweep_s=0.05) as served:
        with SnapshotClient(served.url) as first:
            Writer(first).begin()
        yield served


class StoreProcess:
    """`python -m palimpsest.services.snapshot_store`, always on the same port and over the same run file."""

    def __init__(self, run: Path, *flags: str, environment: Mapping[str, str] = MappingProxyType({})) -> None:
        self.port = free()
        self.url = f"http://127.0.0.1:{self.port}"
        self._run, self._flags, self._environment = run, flags, environment
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> subprocess.Popen[str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PALIMPSEST_", "AWS_"))}
        port = f"--snapshot_store.port={self.port}"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "palimpsest.services.snapshot_store", str(self._run), port, *self._flags],
            env={**kept, **self._environment, "PYTHONPATH": str(ROOT)},
            stderr=subprocess.PIPE,
            text=True,
            cwd=self._run.parent,
        )
        return self.process

    def ready(self) -> None:
        """Wait until the store answers."""
        deadline = time.monotonic() + LIMIT_S
        while time.monotonic() < deadline:
            assert self.process is not None
            assert self.process.poll() is None, self.process.communicate()[1]
            try:
                if httpx.get(f"{self.url}/readyz").status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.02)
        raise AssertionError("the store does not answer")

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None

    def again(self) -> None:
        """Kill the process and start it again, without waiting for it to answer."""
        self.kill()
        self.start()

    def refused(self) -> tuple[int, str]:
        """Start a store that cannot start. Returns its exit code and its standard error."""
        process = self.start()
        _, output = process.communicate(timeout=LIMIT_S)
        self.process = None
        return process.returncode, output

    def metric(self, name: str) -> float:
        """Current value of palimpsest_store_`name`."""
        return metric_of(self.url, name)


def metric_of(url: str, name: str) -> float:
    """Current value of palimpsest_store_`name` at a store."""
    for line in httpx.get(f"{url}/metrics", timeout=LIMIT_S).text.splitlines():
        if line.startswith(f"palimpsest_store_{name} "):
            return float(line.split()[1])
    raise AssertionError(name)
