"""A log, for the tests of ingestion."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from palimpsest.common.bus.sqlite import SqliteBus
from palimpsest.common.messages import (
    TOPICS,
)


@pytest.fixture
def bus(tmp_path: Path) -> Iterator[SqliteBus]:
    bus = SqliteBus(tmp_path / "bus.sqlite")
    bus.create_topics(dict.fromkeys(TOPICS, 2))
    yield bus
    bus.close()
