"""The SQLite log: guarantees beyond the port, and the settings that its durability needs."""

import errno
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from palimpsest.common.bus import sqlite
from palimpsest.common.bus.factory import open_bus
from palimpsest.common.bus.port import Outgoing, partition_of
from palimpsest.common.bus.sqlite import SqliteBus
from palimpsest.common.config import RunConfig
from palimpsest.common.messages import CONTROL, DEAD_LETTERS, OLD_LOGPROBS, TASKS, TOPICS, TRAJECTORIES, WORKERS
from palimpsest.common.user_error import ExitCode, UserError

UNSTORABLE: Any = object()
HALF_BAD = [Outgoing("k", b"first"), Outgoing("k", b"second"), Outgoing("k", UNSTORABLE)]


@pytest.fixture
def bus(tmp_path: Path) -> Iterator[SqliteBus]:
    """A log with one topic of one partition."""
    opened = SqliteBus(tmp_path / "bus.sqlite")
    opened.create_topics({"t": 1})
    yield opened
    opened.close()


def bodies(bus: SqliteBus) -> list[bytes]:
    with bus.consumer("t") as consumer:
        return [record.body for record in consumer.poll(limit=100, timeout_s=0)]


def test_every_commit_is_synced_to_the_disk(bus: SqliteBus) -> None:
    """SQLite's documentation: in WAL mode only synchronous = FULL (2) makes a commit survive a power cut."""
    with bus.consumer("t", group="g", member="m") as consumer:
        for db in (bus._db, consumer._db):
            assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
            assert db.execute("PRAGMA synchronous").fetchone() == (2,)


def test_a_failed_publish_leaves_no_record(bus: SqliteBus) -> None:
    with pytest.raises(sqlite3.ProgrammingError):
        bus.publish("t", HALF_BAD)
    assert bodies(bus) == []
    assert [at.offset for at in bus.publish("t", [Outgoing("k", b"next")])] == [0]


def test_without_the_transaction_half_a_batch_would_remain(bus: SqliteBus, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def nothing(_db: sqlite3.Connection) -> Iterator[None]:
        yield

    monkeypatch.setattr(sqlite, "_writing", nothing)
    with pytest.raises(sqlite3.ProgrammingError):
        bus.publish("t", HALF_BAD)
    assert bodies(bus) == [b"first", b"second"]


def test_a_full_disk_is_an_os_error_that_names_the_file(bus: SqliteBus) -> None:
    bus._db.execute("PRAGMA max_page_count = 20")
    with pytest.raises(OSError, match="No space left on device") as full:
        bus.publish("t", [Outgoing("k", bytes(1 << 20))])
    assert (full.value.errno, full.value.filename) == (errno.ENOSPC, str(bus.path))


def test_after_a_full_disk_the_log_continues_at_the_same_offset(bus: SqliteBus) -> None:
    bus.publish("t", [Outgoing("k", b"before")])
    bus._db.execute("PRAGMA max_page_count = 20")
    with pytest.raises(OSError, match="No space"):
        bus.publish("t", [Outgoing("k", b"small"), Outgoing("k", bytes(1 << 20))])
    bus._db.execute("PRAGMA max_page_count = 10000")
    assert [at.offset for at in bus.publish("t", [Outgoing("k", b"after")])] == [1]
    assert bodies(bus) == [b"before", b"after"]


def test_a_member_of_a_group_needs_a_name(bus: SqliteBus) -> None:
    with pytest.raises(ValueError, match="a consumer of group g needs a member name"):
        bus.consumer("t", group="g")


@pytest.mark.parametrize(("key", "partition"), [("", 0), ("g000007", 3), ("g000000", 0), ("worker-0", 2), ("ä", 3)])
def test_the_partition_of_a_key_never_changes(key: str, partition: int) -> None:
    """crc32 modulo 4; another value would move keys to other partitions of existing logs."""
    assert partition_of(key, 4) == partition


def a_run(folder: Path, **bus: int) -> RunConfig:
    return RunConfig.model_validate(
        {
            "run": {"id": "r", "folder": str(folder)},
            "model": {"path": "none"},
            "tasks": {"environments": {"lookup": 1.0}},
            "learner": {"versions": 1},
            "bus": bus,
        }
    )


def test_a_runs_log_has_every_topic(tmp_path: Path) -> None:
    opened = open_bus(a_run(tmp_path, task_partitions=3, trajectory_partitions=2))
    partitions = {}
    for topic in TOPICS:
        with opened.consumer(topic) as consumer:
            partitions[topic] = len(consumer.ends())
    opened.close()
    assert partitions == {TASKS: 3, TRAJECTORIES: 2, CONTROL: 1, WORKERS: 1, OLD_LOGPROBS: 2, DEAD_LETTERS: 1}


def test_a_run_with_other_partitions_than_its_log_is_refused(tmp_path: Path) -> None:
    open_bus(a_run(tmp_path, task_partitions=3)).close()
    with pytest.raises(UserError) as error:
        open_bus(a_run(tmp_path, task_partitions=4))
    assert error.value.code is ExitCode.CONFIGURATION
    assert "topic tasks" in str(error.value)
    assert (
        "has 3 partitions; the run needs 4\nThe number of partitions cannot change during a run: restore bus.task"
        in str(error.value)
    )


def test_a_new_log_waits_for_another_process_that_creates_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite's busy timeout does not cover this case: the switch to WAL fails at once while another process writes."""
    other = sqlite3.connect(tmp_path / "bus.sqlite", isolation_level=None)
    other.execute("CREATE TABLE begun (by TEXT)")
    other.execute("BEGIN IMMEDIATE")
    pauses: list[float] = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            other.execute("COMMIT")

    monkeypatch.setattr(sqlite, "time", SimpleNamespace(monotonic=time.monotonic, sleep=pause))
    SqliteBus(tmp_path / "bus.sqlite").close()
    assert len(pauses) == 3
    other.close()


def test_a_log_that_stays_locked_is_not_waited_for_forever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = sqlite3.connect(tmp_path / "bus.sqlite", isolation_level=None)
    other.execute("CREATE TABLE begun (by TEXT)")
    other.execute("BEGIN IMMEDIATE")
    monkeypatch.setattr(sqlite, "BUSY_S", 0.05)
    with pytest.raises(sqlite3.OperationalError, match="database is locked"):
        SqliteBus(tmp_path / "bus.sqlite")
    other.close()


class Clocks:
    """The clock of a machine, and the name of its start."""

    def __init__(self) -> None:
        self.now, self.boot = 1000.0, "first"


def members_of(path: Path, clocks: Clocks, *names: str) -> list[sqlite.SqliteConsumer]:
    bus = SqliteBus(path, lease_s=10.0, clock=lambda: clocks.now, boot=lambda: clocks.boot)
    bus.create_topics({"shared": 2})
    members = [bus.consumer("shared", group="g", member=name) for name in names]
    bus.close()
    return members


@pytest.mark.parametrize("step_s", [-3600.0, 3600.0])
def test_a_step_of_the_wall_clock_neither_keeps_nor_ends_a_lease(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step_s: float
) -> None:
    clocks, wall = Clocks(), sqlite.time.time
    dead, alive = members_of(tmp_path / "bus.sqlite", clocks, "a", "b")
    for member in (dead, alive, dead):
        member.poll(limit=0, timeout_s=0)
    assert (dead.assignment(), alive.assignment()) == ({0}, {1})
    monkeypatch.setattr(sqlite.time, "time", lambda: wall() + step_s)
    clocks.now += 9.0
    alive.poll(limit=0, timeout_s=0)
    assert alive.assignment() == {1}, "the lease of the other is not over"
    clocks.now += 4.0
    alive.poll(limit=0, timeout_s=0)
    assert alive.assignment() == {0, 1}


def test_a_lease_of_an_earlier_start_of_the_machine_is_over(tmp_path: Path) -> None:
    clocks = Clocks()
    (dead,) = members_of(tmp_path / "bus.sqlite", clocks, "a")
    dead.poll(limit=0, timeout_s=0)
    clocks.now, clocks.boot = 5.0, "second"  # its lease would last for another 995 seconds
    (next_one,) = members_of(tmp_path / "bus.sqlite", clocks, "b")
    next_one.poll(limit=0, timeout_s=0)
    assert next_one.assignment() == {0, 1}


@pytest.mark.parametrize(("away_s", "expected"), [(10.0, []), (10.1, [1, 2])])
def test_a_member_away_for_longer_than_its_lease_continues_from_the_commit(
    tmp_path: Path, away_s: float, expected: list[int]
) -> None:
    clocks = Clocks()
    bus = SqliteBus(tmp_path / "bus.sqlite", lease_s=10.0, clock=lambda: clocks.now)
    bus.create_topics({"t": 1})
    bus.publish("t", [Outgoing("k", b"")] * 3)
    with bus.consumer("t", group="g", member="m") as member:
        assert len(member.poll(limit=9, timeout_s=0)) == 3
        member.commit({0: 1})
        clocks.now += away_s
        assert [record.offset for record in member.poll(limit=9, timeout_s=0)] == expected
    bus.close()
