"""A log looked at from outside: nothing is made, and everything that stands is read once."""

import sqlite3
from pathlib import Path

import pytest

from common.bus.open import open_bus
from common.bus.port import Outgoing
from common.bus.sqlite import SqliteBus
from common.bus.standing import scan, standing_bus
from common.config import load
from common.config.schema import RunConfig
from common.refusal import Refusal

RUN = 'run.id = "test"\nmodel.path = "m"\ntasks.environments = { lookup = 1.0 }\nlearner.versions = 3\n'


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    path = tmp_path / "run.toml"
    path.write_text(RUN)
    return load([str(path), f"--run.folder={tmp_path}"], {}, program="").config


@pytest.fixture
def bus(tmp_path: Path) -> SqliteBus:
    bus = SqliteBus(tmp_path / "bus.sqlite")
    bus.create_topics({"t": 3})
    return bus


def fill(bus: SqliteBus, records: int) -> None:
    bus.publish("t", [Outgoing(f"key {i}", str(i).encode()) for i in range(records)])


def cut(bus: SqliteBus, partition: int, first: int) -> None:
    """What retention does."""
    with sqlite3.connect(bus.path) as db:
        db.execute("DELETE FROM records WHERE topic = 't' AND partition = ? AND offset < ?", (partition, first))
        db.execute("UPDATE ends SET first = ? WHERE topic = 't' AND partition = ?", (first, partition))


def test_a_log_that_is_not_there_is_refused_and_not_made(config: RunConfig) -> None:
    with pytest.raises(Refusal, match="no such log"):
        standing_bus(config)
    assert not config.bus_path.exists()
    SqliteBus(config.bus_path).close()
    with pytest.raises(Refusal, match="run test has no log yet"):
        standing_bus(config)
    open_bus(config).close()
    standing_bus(config).close()


def test_everything_that_stands_is_read_once(bus: SqliteBus) -> None:
    assert list(scan(bus, "t")) == []
    fill(bus, 5000)  # several polls' worth
    assert sorted(int(record.body) for record in scan(bus, "t")) == list(range(5000))


def test_what_comes_meanwhile_is_left_for_the_next_time(bus: SqliteBus) -> None:
    fill(bus, 10)
    reading = scan(bus, "t")
    first = next(reading)
    fill(bus, 10)
    assert len([first, *reading]) == 10


def test_it_begins_where_it_is_told_and_at_the_front_elsewhere(bus: SqliteBus) -> None:
    fill(bus, 60)
    with bus.consumer("t") as consumer:
        ends = consumer.ends()
    found = list(scan(bus, "t", {0: ends[0] - 2, 1: ends[1]}))
    assert [record.offset for record in found if record.partition == 0] == [ends[0] - 2, ends[0] - 1]
    assert [record.offset for record in found if record.partition == 1] == []
    assert [record.offset for record in found if record.partition == 2] == list(range(ends[2]))


def test_what_retention_took_does_not_keep_it_waiting(bus: SqliteBus) -> None:
    fill(bus, 60)
    with bus.consumer("t") as consumer:
        ends = consumer.ends()
    cut(bus, 0, ends[0])
    cut(bus, 1, 5)
    found = list(scan(bus, "t", {1: 2}))
    assert [record.offset for record in found if record.partition == 0] == []
    assert [record.offset for record in found if record.partition == 1] == list(range(5, ends[1]))
