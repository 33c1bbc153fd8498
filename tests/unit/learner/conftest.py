"""A real snapshot store, served by a thread, for tests of learner modules that use one."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from palimpsest.common.service import Server
from palimpsest.common.snapshots.client import SnapshotClient
from palimpsest.common.snapshots.writer import Writer
from palimpsest.services.snapshot_store.app import create_app
from palimpsest.services.snapshot_store.storage_disk import DiskStorage


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SnapshotClient]:
    app = create_app(DiskStorage(tmp_path / "store"), sweep_s=3600)
    with (
        Server(app, "127.0.0.1", 0, key="snapshot_store") as server,
        SnapshotClient(f"http://127.0.0.1:{server.port}", sleep=lambda _: None) as client,
    ):
        Writer(client).begin()
        yield client
