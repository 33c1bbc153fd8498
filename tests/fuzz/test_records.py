"""Mutated records of every topic are accepted, passed over or dead-lettered; none ends a reader or stalls it."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from palimpsest.common.bus.port import Bus
from palimpsest.common.bus.sqlite import SqliteBus
from palimpsest.common.messages import TOPICS
from tests.fuzz.fuzzer import fuzz
from tests.fuzz.readers import ACCEPTED, PARTITIONS, REJECTED
from tests.simulation.memory_bus import MemoryBus, Store

STALL_S = 1.0
"""Processor time after which one record counts as a stall."""


@pytest.fixture(params=["sqlite", "memory"])
def bus(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bus]:
    with closing(SqliteBus(tmp_path / "bus.sqlite") if request.param == "sqlite" else MemoryBus(Store())) as bus:
        bus.create_topics(dict.fromkeys(TOPICS, PARTITIONS))
        yield bus


@pytest.mark.parametrize("seed", [1])
def test_every_mutated_record_is_accounted_for(bus: Bus, seed: int) -> None:
    figures = fuzz(bus, 1_000, seed=seed)
    assert figures.records == 1_000
    assert figures.outcomes[ACCEPTED] > 100
    assert figures.outcomes[REJECTED] > 100
    assert figures.trained > 0
    assert figures.slowest_s < STALL_S
