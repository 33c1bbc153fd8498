"""What the services rely on in a log, for every adapter; with real processes where the promise is about processes."""

import itertools
import multiprocessing
import sqlite3
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import pytest

from common.bus.port import Bus, Consumer, OffsetGone, Outgoing, Position, Record
from common.bus.sqlite import SqliteBus

TOPIC, PARTITIONS, GROUP = "things", 4, "workers"
LIMIT_S = 60.0
"""Nothing here takes so long unless it is broken."""
BATCH = 25


@dataclass(frozen=True)
class SqliteLog:
    """A log in a SQLite file; `open` may be called in any process."""

    path: Path
    lease_s: float = 10.0

    def open(self) -> Bus:
        return SqliteBus(self.path, lease_s=self.lease_s)

    def with_lease(self, lease_s: float) -> "SqliteLog":
        """The same log, for members that are gone when not heard of for so long."""
        return replace(self, lease_s=lease_s)

    def cut(self, partition: int, before: int) -> None:
        """Retention: the log lets go of the partition's records below this offset."""
        with closing(sqlite3.connect(self.path)) as db, db:
            db.execute(
                "DELETE FROM records WHERE topic = ? AND partition = ? AND offset < ?", (TOPIC, partition, before)
            )
            db.execute("UPDATE ends SET first = ? WHERE topic = ? AND partition = ?", (before, TOPIC, partition))


Log = SqliteLog
LOGS: dict[str, Callable[[Path], Log]] = {"sqlite": lambda folder: SqliteLog(folder / "bus.sqlite")}


@pytest.fixture(params=LOGS)
def log(request: pytest.FixtureRequest, tmp_path: Path) -> Log:
    """A log with one topic of four partitions."""
    made = LOGS[request.param](tmp_path)
    with closing(made.open()) as bus:
        bus.create_topics({TOPIC: PARTITIONS})
    return made


@pytest.fixture
def bus(log: Log) -> Iterator[Bus]:
    """The log, open."""
    with closing(log.open()) as opened:
        yield opened


Spawn = Callable[..., tuple[SpawnProcess, Connection]]


@pytest.fixture
def spawn() -> Iterator[Spawn]:
    """Run a function of this file in a process of its own, with a line to it; ended with the test."""
    context, started = multiprocessing.get_context("spawn"), list[SpawnProcess]()

    def spawn(target: Callable[..., None], *arguments: Any) -> tuple[SpawnProcess, Connection]:
        ours, theirs = context.Pipe()
        process = context.Process(target=target, args=(*arguments, theirs), daemon=True)
        process.start()
        theirs.close()  # so that its death ends the line
        started.append(process)
        return process, ours

    yield spawn
    for process in started:
        process.kill()
        process.join()


def told(line: Connection) -> Any:
    """What the process says next."""
    assert line.poll(LIMIT_S), "the process says nothing"
    return line.recv()


def everything_told(line: Connection) -> list[Any]:
    """All that a process said before it died."""
    said = []
    try:
        while line.poll(LIMIT_S):
            said.append(line.recv())
    except (EOFError, ConnectionResetError):
        return said
    raise AssertionError("the process lives")


def things(*bodies: str, key: str = "k") -> list[Outgoing]:
    return [Outgoing(key, body.encode()) for body in bodies]


def read_all(bus: Bus) -> list[Record]:
    with bus.consumer(TOPIC) as consumer:
        left = sum(consumer.ends().values())
        records: list[Record] = []
        while len(records) < left:
            records += consumer.poll(limit=1000, timeout_s=LIMIT_S)
    return records


def bodies(records: list[Record]) -> list[str]:
    return [record.body.decode() for record in records]


def poll_until(done: Callable[[], bool], *consumers: Consumer) -> list[Record]:
    """Poll them in turn; everything read until then."""
    records: list[Record] = []
    deadline = time.monotonic() + LIMIT_S
    while not done():
        assert time.monotonic() < deadline, [consumer.assignment() for consumer in consumers]
        for consumer in consumers:
            records += consumer.poll(limit=1000, timeout_s=0.01)
    return records


def shared(*consumers: Consumer) -> bool:
    """Whether they read every partition among them, each one once, and each has some."""
    shares = [consumer.assignment() for consumer in consumers]
    return all(shares) and sorted(itertools.chain(*shares)) == list(range(PARTITIONS))


def test_a_record_is_read_as_it_was_published(bus: Bus) -> None:
    headers = {"trajectory": "g000007/3", "ä": "größer als π ≈ 3\n"}
    (at,) = bus.publish(TOPIC, [Outgoing("g000007", b"\x00\xffbody", headers)])
    assert read_all(bus) == [Record(TOPIC, at.partition, at.offset, "g000007", b"\x00\xffbody", headers)]


@pytest.mark.parametrize("body", [b"", b"\x00", bytes(range(256))])
def test_any_bytes_are_a_body(bus: Bus, body: bytes) -> None:
    bus.publish(TOPIC, [Outgoing("", body)])
    assert [(record.key, record.body) for record in read_all(bus)] == [("", body)]


def test_a_record_of_five_megabytes_is_whole(bus: Bus) -> None:
    body = bytes(range(250)) * 20_000
    bus.publish(TOPIC, [Outgoing("big", body)])
    (record,) = read_all(bus)
    assert record.body == body


def test_offsets_are_consecutive_from_0_in_every_partition(bus: Bus) -> None:
    positions: list[Position] = []
    for batch in range(5):
        positions += bus.publish(TOPIC, [Outgoing(f"k{i}", b"") for i in range(batch, batch + 7)])
    offsets = defaultdict(list)
    for at in positions:
        offsets[at.partition].append(at.offset)
    assert len(offsets) == PARTITIONS
    assert all(partition == list(range(len(partition))) for partition in offsets.values())


def test_positions_come_in_the_order_of_the_records(bus: Bus) -> None:
    positions = bus.publish(TOPIC, [Outgoing(f"k{i}", str(i).encode()) for i in range(20)])
    found = {Position(r.partition, r.offset): r.body for r in read_all(bus)}
    assert [found[at] for at in positions] == [str(i).encode() for i in range(20)]


def test_publishing_nothing_is_harmless(bus: Bus) -> None:
    assert bus.publish(TOPIC, []) == []
    assert read_all(bus) == []


def test_records_of_one_key_keep_their_order(bus: Bus) -> None:
    for i in range(30):
        bus.publish(TOPIC, things(f"{i}a", f"{i}b", key=f"k{i % 3}"))
    of_key = defaultdict(list)
    for record in read_all(bus):
        of_key[record.key].append(record.body.decode())
    assert of_key == {f"k{k}": [f"{i}{x}" for i in range(k, 30, 3) for x in "ab"] for k in range(3)}


def test_threads_of_one_process_may_share_a_bus(bus: Bus) -> None:
    def publish(name: int) -> None:
        for i in range(20):
            bus.publish(TOPIC, things(f"{name} {i}", key=f"k{i % 5}"))

    threads = [threading.Thread(target=publish, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Counter(bodies(read_all(bus))) == Counter(f"{name} {i}" for name in range(4) for i in range(20))


def publish_many(log: Log, name: str, line: Connection) -> None:
    """A process: publishes batches under shared keys as fast as it can."""
    with closing(log.open()) as bus:
        line.send("ready")
        line.recv()
        for batch in range(20):
            bus.publish(TOPIC, [Outgoing(f"k{i % 7}", f"{name} {10 * batch + i}".encode()) for i in range(10)])
    line.send("done")


def test_several_processes_publish_at_once_without_loss_and_each_key_in_order(log: Log, spawn: Spawn) -> None:
    names = ["one", "two", "three"]
    lines = [spawn(publish_many, log, name)[1] for name in names]
    assert [told(line) for line in lines] == ["ready"] * 3
    for line in lines:
        line.send("go")
    assert [told(line) for line in lines] == ["done"] * 3
    with closing(log.open()) as bus:
        records = read_all(bus)
    assert Counter(bodies(records)) == Counter(f"{name} {i}" for name in names for i in range(200))
    offsets, order = defaultdict(list), defaultdict(list)
    for record in records:
        name, number = record.body.decode().split()
        offsets[record.partition].append(record.offset)
        order[name, record.key].append(int(number))
    assert all(partition == list(range(len(partition))) for partition in offsets.values())
    assert all(numbers == sorted(numbers) for numbers in order.values())


KEYS = [f"g{i:06d}" for i in range(60)]


def publish_keys(log: Log, line: Connection) -> None:
    """A process: one record for each key; says where they went."""
    with closing(log.open()) as bus:
        line.send([at.partition for at in bus.publish(TOPIC, [Outgoing(key, b"") for key in KEYS])])


def test_a_key_lands_in_the_same_partition_whichever_process_publishes(log: Log, bus: Bus, spawn: Spawn) -> None:
    ours = [at.partition for at in bus.publish(TOPIC, [Outgoing(key, b"") for key in KEYS])]
    assert set(ours) == set(range(PARTITIONS))
    assert told(spawn(publish_keys, log)[1]) == ours


def publish_forever(log: Log, line: Connection) -> None:
    """A process: batch after batch, each one said after `publish` has returned."""
    with closing(log.open()) as bus:
        for batch in itertools.count():
            bus.publish(TOPIC, [Outgoing("k", f"{batch} {i}".encode() + bytes(2000)) for i in range(BATCH)])
            line.send(batch)


@pytest.mark.parametrize("after", [0, 7])
def test_a_publisher_killed_in_the_middle_leaves_whole_batches_and_all_that_it_was_told_of(
    log: Log, spawn: Spawn, after: int
) -> None:
    process, line = spawn(publish_forever, log)
    while told(line) < after:
        pass
    process.kill()
    acknowledged = max(everything_told(line), default=after)
    with closing(log.open()) as bus:
        found = [record.body.rstrip(b"\0").decode() for record in read_all(bus)]
        batches = len(found) // BATCH
        assert found == [f"{batch} {i}" for batch in range(batches) for i in range(BATCH)]
        assert acknowledged + 1 <= batches <= acknowledged + 2
        assert bus.publish(TOPIC, things("next"))[0].offset == len(found)


def test_a_reader_without_a_group_reads_everything_from_the_start(bus: Bus) -> None:
    bus.publish(TOPIC, things("a", "b"))
    assert [bodies(read_all(bus)) for _ in range(2)] == [["a", "b"]] * 2


def test_a_reader_without_a_group_has_every_partition(bus: Bus) -> None:
    with bus.consumer(TOPIC) as consumer:
        assert consumer.assignment() == frozenset(range(PARTITIONS))


def test_a_reader_without_a_group_has_nothing_to_commit_to(bus: Bus) -> None:
    with bus.consumer(TOPIC) as consumer, pytest.raises(ValueError, match="without a group"):
        consumer.commit({0: 0})


def test_a_poll_gives_at_most_what_it_is_asked_for_and_goes_on_behind_it(bus: Bus) -> None:
    bus.publish(TOPIC, things(*map(str, range(10))))
    with bus.consumer(TOPIC) as consumer:
        polls = [bodies(consumer.poll(limit=4, timeout_s=0)) for _ in range(4)]
    assert polls == [["0", "1", "2", "3"], ["4", "5", "6", "7"], ["8", "9"], []]


def test_no_partition_starves_behind_a_full_one(bus: Bus) -> None:
    busy, quiet = KEYS[0], next(k for k in KEYS if bus.publish(TOPIC, things("x", key=k))[0].partition != 0)
    bus.publish(TOPIC, [Outgoing(busy, b"busy")] * 100)
    (at,) = bus.publish(TOPIC, things("quiet", key=quiet))
    with bus.consumer(TOPIC) as consumer:
        consumer.seek({at.partition: at.offset})
        polls = [consumer.poll(limit=1, timeout_s=0) for _ in range(2 * PARTITIONS)]
    assert "quiet" in bodies(list(itertools.chain(*polls)))


def test_a_poll_without_news_ends_when_its_time_is_over(bus: Bus) -> None:
    with bus.consumer(TOPIC) as consumer:
        began = time.monotonic()
        assert consumer.poll(limit=10, timeout_s=0.05) == []
        assert 0.05 <= time.monotonic() - began < LIMIT_S


def publish_one(log: Log, line: Connection) -> None:
    """A process: publishes when it is told to; says when it was durable, by the machine's clock."""
    with closing(log.open()) as bus:
        line.send("ready")
        line.recv()
        bus.publish(TOPIC, things("news"))
        line.send(time.monotonic())


def test_a_poll_returns_promptly_when_another_process_publishes(log: Log, bus: Bus, spawn: Spawn) -> None:
    _, line = spawn(publish_one, log)
    assert told(line) == "ready"
    with bus.consumer(TOPIC) as consumer:
        assert consumer.poll(limit=10, timeout_s=0) == []
        line.send("go")
        assert bodies(consumer.poll(limit=10, timeout_s=LIMIT_S)) == ["news"]
        arrived = time.monotonic()
    assert arrived - told(line) < 2.0


def test_a_group_member_that_waits_hears_of_news_too(bus: Bus) -> None:
    with bus.consumer(TOPIC, group=GROUP, member="a") as consumer:
        assert consumer.poll(limit=10, timeout_s=0) == []
        bus.publish(TOPIC, things("news"))
        assert bodies(consumer.poll(limit=10, timeout_s=LIMIT_S)) == ["news"]


def test_ends_are_the_offsets_after_the_last_records(bus: Bus) -> None:
    with bus.consumer(TOPIC) as consumer:
        assert consumer.ends() == dict.fromkeys(range(PARTITIONS), 0)
        (*_, at) = bus.publish(TOPIC, things("a", "b", "c"))
        assert consumer.ends() == {**dict.fromkeys(range(PARTITIONS), 0), at.partition: 3}


def test_after_a_seek_reading_goes_on_from_there(bus: Bus) -> None:
    (at, *_) = bus.publish(TOPIC, things("a", "b", "c"))
    with bus.consumer(TOPIC) as consumer:
        assert bodies(consumer.poll(limit=10, timeout_s=0)) == ["a", "b", "c"]
        consumer.seek({at.partition: 1})
        assert bodies(consumer.poll(limit=10, timeout_s=0)) == ["b", "c"]
        consumer.seek({at.partition: 3})
        assert consumer.poll(limit=10, timeout_s=0) == []


@pytest.mark.parametrize("offset", [4, 1000, -1])
def test_a_seek_to_where_the_log_never_was_is_refused_and_changes_nothing(bus: Bus, offset: int) -> None:
    (at, *_) = bus.publish(TOPIC, things("a", "b", "c"))
    with bus.consumer(TOPIC) as consumer:
        with pytest.raises(OffsetGone, match=rf"{TOPIC}\[{at.partition}\] holds offsets 0 to 3, not {offset}"):
            consumer.seek({at.partition: offset})
        assert bodies(consumer.poll(limit=10, timeout_s=0)) == ["a", "b", "c"]


def test_a_seek_in_a_partition_that_is_not_there_is_refused(bus: Bus) -> None:
    with bus.consumer(TOPIC) as consumer, pytest.raises(OffsetGone, match=f"{TOPIC} has no partition {PARTITIONS}"):
        consumer.seek({PARTITIONS: 0})


def test_a_seek_below_where_the_log_was_cut_is_refused(log: Log, bus: Bus) -> None:
    (at, *_) = bus.publish(TOPIC, things("a", "b", "c"))
    log.cut(at.partition, before=2)
    with bus.consumer(TOPIC) as consumer, pytest.raises(OffsetGone, match="holds offsets 2 to 3, not 1"):
        consumer.seek({at.partition: 1})


def test_a_reader_overtaken_by_a_cut_is_told_and_skips_nothing(log: Log, bus: Bus) -> None:
    (at, *_) = bus.publish(TOPIC, things("a", "b", "c"))
    with bus.consumer(TOPIC) as consumer:
        assert bodies(consumer.poll(limit=1, timeout_s=0)) == ["a"]
        log.cut(at.partition, before=2)
        with pytest.raises(OffsetGone, match="offset 1 is gone"):
            consumer.poll(limit=10, timeout_s=0)


def test_a_group_goes_on_where_it_committed(bus: Bus) -> None:
    (at, *_) = bus.publish(TOPIC, things("a", "b", "c"))
    with bus.consumer(TOPIC, group=GROUP, member="first") as consumer:
        assert bodies(consumer.poll(limit=10, timeout_s=LIMIT_S)) == ["a", "b", "c"]
        consumer.commit({at.partition: 2})
    with bus.consumer(TOPIC, group=GROUP, member="second") as consumer:
        assert bodies(consumer.poll(limit=10, timeout_s=LIMIT_S)) == ["c"]


def test_a_group_that_committed_nothing_starts_at_the_beginning(bus: Bus) -> None:
    bus.publish(TOPIC, things("a"))
    for member in ("first", "second"):
        with bus.consumer(TOPIC, group=GROUP, member=member) as consumer:
            assert bodies(consumer.poll(limit=10, timeout_s=LIMIT_S)) == ["a"]


def test_groups_do_not_know_of_each_other(bus: Bus) -> None:
    (at,) = bus.publish(TOPIC, things("a"))
    for group in ("these", "those"):
        with bus.consumer(TOPIC, group=group, member="m") as consumer:
            assert bodies(consumer.poll(limit=10, timeout_s=LIMIT_S)) == ["a"]
            assert consumer.assignment() == frozenset(range(PARTITIONS))
            consumer.commit({at.partition: 1})


def test_a_member_alone_has_every_partition_after_its_first_poll(bus: Bus) -> None:
    with bus.consumer(TOPIC, group=GROUP, member="a") as consumer:
        assert consumer.assignment() == frozenset()
        consumer.poll(limit=1, timeout_s=0)
        assert consumer.assignment() == frozenset(range(PARTITIONS))


def test_members_share_the_partitions_when_one_joins(bus: Bus) -> None:
    with bus.consumer(TOPIC, group=GROUP, member="a") as a, bus.consumer(TOPIC, group=GROUP, member="b") as b:
        a.poll(limit=1, timeout_s=0)
        poll_until(lambda: shared(a, b), a, b)
        assert [len(a.assignment()), len(b.assignment())] == [2, 2]


def test_more_members_than_partitions_leave_some_without(bus: Bus) -> None:
    members = [bus.consumer(TOPIC, group=GROUP, member=f"m{i}") for i in range(PARTITIONS + 2)]
    poll_until(lambda: sorted(len(m.assignment()) for m in members) == [0, 0] + [1] * PARTITIONS, *members)
    for member in members:
        member.close()


def test_partitions_of_a_member_that_leaves_go_to_the_others(bus: Bus) -> None:
    with bus.consumer(TOPIC, group=GROUP, member="a") as a:
        b = bus.consumer(TOPIC, group=GROUP, member="b")
        poll_until(lambda: shared(a, b), a, b)
        b.close()
        poll_until(lambda: len(a.assignment()) == PARTITIONS, a)


def test_an_assignment_changes_only_inside_a_poll(bus: Bus) -> None:
    with bus.consumer(TOPIC, group=GROUP, member="a") as a, bus.consumer(TOPIC, group=GROUP, member="b") as b:
        a.poll(limit=1, timeout_s=0)
        b.poll(limit=1, timeout_s=0)
        assert a.assignment() == frozenset(range(PARTITIONS))


def test_a_commit_of_partitions_that_went_to_another_member_is_left_out(bus: Bus) -> None:
    bus.publish(TOPIC, [Outgoing(key, b"") for key in KEYS])
    with bus.consumer(TOPIC, group=GROUP, member="a") as a:
        a.poll(limit=1000, timeout_s=LIMIT_S)
        b = bus.consumer(TOPIC, group=GROUP, member="b")
        poll_until(lambda: shared(a, b), a, b)
        kept, lost = a.assignment(), b.assignment()
        a.commit(dict.fromkeys(range(PARTITIONS), 3))
        b.close()
    with bus.consumer(TOPIC, group=GROUP, member="c") as c:
        firsts: dict[int, int] = {}
        for record in c.poll(limit=1000, timeout_s=LIMIT_S):
            firsts.setdefault(record.partition, record.offset)
    assert firsts == dict.fromkeys(kept, 3) | dict.fromkeys(lost, 0)


def work_in_group(log: Log, line: Connection) -> None:
    """A process: a member that reads, commits what it is told to, and waits for its death."""
    with closing(log.open()) as bus, bus.consumer(TOPIC, group=GROUP, member="victim") as consumer:
        records: list[Record] = []
        while not records:
            records = consumer.poll(limit=1000, timeout_s=1.0)
        line.send((consumer.assignment(), [(r.partition, r.offset, r.body) for r in records]))
        consumer.commit(line.recv())
        line.send("committed")
        while True:
            consumer.poll(limit=1000, timeout_s=1.0)


def test_what_a_killed_member_had_not_committed_is_delivered_again(log: Log, spawn: Spawn) -> None:
    log = log.with_lease(2.0)
    with closing(log.open()) as bus:
        bus.publish(TOPIC, [Outgoing(key, f"{i}".encode()) for key in KEYS for i in range(2)])
        process, line = spawn(work_in_group, log)
        assignment, read = told(line)
        assert assignment == frozenset(range(PARTITIONS))
        line.send(dict.fromkeys(range(PARTITIONS), 5))
        assert told(line) == "committed"
        with bus.consumer(TOPIC, group=GROUP, member="survivor") as survivor:
            process.kill()
            process.join()
            records = poll_until(lambda: survivor.assignment() == frozenset(range(PARTITIONS)), survivor)
            records += survivor.poll(limit=1000, timeout_s=0)
            ends = survivor.ends()
    assert len(read) == 2 * len(KEYS)
    again = {(record.partition, record.offset) for record in records}
    assert again == {(p, offset) for p, end in ends.items() for offset in range(5, end)}


def test_without_its_lease_running_out_a_dead_members_partitions_would_stay_with_it(log: Log, spawn: Spawn) -> None:
    log = log.with_lease(3600.0)
    with closing(log.open()) as bus:
        bus.publish(TOPIC, [Outgoing(key, b"") for key in KEYS])
        process, line = spawn(work_in_group, log)
        told(line)
        process.kill()
        process.join()
        with bus.consumer(TOPIC, group=GROUP, member="survivor") as survivor:
            survivor.poll(limit=1000, timeout_s=0.5)
            assert len(survivor.assignment()) == PARTITIONS // 2


def test_a_member_that_stopped_polling_cannot_commit_over_its_successor(log: Log) -> None:
    with closing(log.with_lease(1.5).open()) as bus:
        bus.publish(TOPIC, [Outgoing(key, b"") for key in KEYS])
        with (
            bus.consumer(TOPIC, group=GROUP, member="sleeper") as sleeper,
            bus.consumer(TOPIC, group=GROUP, member="successor") as successor,
        ):
            sleeper.poll(limit=1000, timeout_s=LIMIT_S)
            poll_until(lambda: successor.assignment() == frozenset(range(PARTITIONS)), successor)
            successor.commit(dict.fromkeys(range(PARTITIONS), 7))
            sleeper.commit(dict.fromkeys(range(PARTITIONS), 2))
        with bus.consumer(TOPIC, group=GROUP, member="next") as following:
            firsts: dict[int, int] = {}
            for record in following.poll(limit=1000, timeout_s=LIMIT_S):
                firsts.setdefault(record.partition, record.offset)
    assert firsts == dict.fromkeys(range(PARTITIONS), 7)


def test_topics_are_made_once(bus: Bus) -> None:
    bus.publish(TOPIC, things("a"))
    bus.create_topics({TOPIC: PARTITIONS, "more": 1})
    assert bodies(read_all(bus)) == ["a"]
    assert bus.publish("more", things("b")) == [Position(0, 0)]


def test_a_topic_with_other_partitions_is_refused_by_both_numbers(bus: Bus) -> None:
    with pytest.raises(ValueError, match=f"topic {TOPIC} .* has {PARTITIONS} partitions, 5 are asked for"):
        bus.create_topics({"new": 2, TOPIC: 5})
    with pytest.raises(LookupError):
        bus.publish("new", things("a"))


def test_an_unknown_topic_is_named(bus: Bus) -> None:
    for use in (lambda: bus.publish("nothing", things("a")), lambda: bus.consumer("nothing")):
        with pytest.raises(LookupError, match="topic nothing does not exist"):
            use()
    with (
        bus.consumer("nothing", group=GROUP, member="m") as consumer,
        pytest.raises(LookupError, match="topic nothing does not exist"),
    ):
        consumer.poll(limit=1, timeout_s=0)


def open_new(log: Log, line: Connection) -> None:
    """A process: opens a log that may not be there yet, as soon as it is told to."""
    line.send("ready")
    line.recv()
    with closing(log.open()) as bus:
        bus.create_topics({TOPIC: PARTITIONS})
        bus.publish(TOPIC, things("here"))
    line.send("done")


def test_several_processes_may_open_a_new_log_at_once(tmp_path: Path, log: Log, spawn: Spawn) -> None:
    new = replace(log, path=tmp_path / "another" / "bus.sqlite") if isinstance(log, SqliteLog) else log
    lines = [spawn(open_new, new)[1] for _ in range(3)]
    assert [told(line) for line in lines] == ["ready"] * 3
    for line in lines:
        line.send("go")
    assert [told(line) for line in lines] == ["done"] * 3
    with closing(new.open()) as bus:
        assert bodies(read_all(bus)) == ["here"] * 3
