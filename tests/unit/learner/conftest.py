"""A real store, served by a thread, for the learner's modules that speak to one."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from common.snapshots.client import SnapshotClient
from common.snapshots.writer import Writer
from services.snapshot_store.app import create_app
from services.snapshot_store.storage_disk import DiskStorage
from tests.served import served


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SnapshotClient]:
    app = create_app(DiskStorage(tmp_path / "store"), sweep_s=3600)
    with (
        served(app, key="snapshot_store") as url,
        SnapshotClient(url, sleep=lambda _: None) as client,
    ):
        Writer(client).begin()
        yield client
