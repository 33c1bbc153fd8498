"""A log, and a store with three versions, for the tests of the replica."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from palimpsest.common.bus.sqlite import SqliteBus
from palimpsest.common.snapshots.client import SnapshotClient
from tests.unit.learner.replica.replicas import TOPICS, Setup


@pytest.fixture
def bus(tmp_path: Path) -> Iterator[SqliteBus]:
    opened = SqliteBus(tmp_path / "bus.sqlite")
    opened.create_topics(TOPICS)
    yield opened
    opened.close()


@pytest.fixture
def setup(starting_model: Path, store: SnapshotClient, bus: SqliteBus) -> Setup:
    return Setup(starting_model, store, bus)
