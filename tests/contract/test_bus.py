"""What the services rely on in a log, for every adapter: records, offsets, seeking; in real processes where the promise
is about processes."""

import itertools
import threading
import time
from collections import Counter, defaultdict
from contextlib import closing
from multiprocessing.connection import Connection

import pytest

from palimpsest.common.bus.port import Bus, OffsetGone, Outgoing, Position, Record
from tests.contract.logs import (
    KEYS,
    LIMIT_S,
    PARTITIONS,
    TOPIC,
    Log,
    Spawn,
    SqliteLog,
    bodies,
    everything_told,
    read_all,
    take,
    things,
    told,
)

BATCH = 25


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


@pytest.mark.thorough
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


def publish_keys(log: Log, line: Connection) -> None:
    """A process: one record for each key; says where they went."""
    with closing(log.open()) as bus:
        line.send([at.partition for at in bus.publish(TOPIC, [Outgoing(key, b"") for key in KEYS])])


@pytest.mark.thorough
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


@pytest.mark.thorough
@pytest.mark.parametrize("after", [0, 7])
def test_a_publisher_killed_in_the_middle_leaves_all_that_it_was_told_of_in_order(
    log: Log, spawn: Spawn, after: int
) -> None:
    process, line = spawn(publish_forever, log)
    while told(line) < after:
        pass
    process.kill()
    acknowledged = max(everything_told(line), default=after)
    with closing(log.open()) as bus:
        found = [record.body.rstrip(b"\0").decode() for record in read_all(bus)]
        batches, rest = divmod(len(found), BATCH)
        assert rest == 0 or not isinstance(log, SqliteLog)  # there a batch is one commit
        assert found == [f"{n // BATCH} {n % BATCH}" for n in range(len(found))]
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
        polls: list[list[str]] = []
        while sum(map(len, polls)) < 10:
            polls.append(bodies(consumer.poll(limit=4, timeout_s=LIMIT_S)))
        assert consumer.poll(limit=4, timeout_s=0.05) == []
    assert max(map(len, polls)) <= 4
    assert list(itertools.chain(*polls)) == list(map(str, range(10)))


def test_no_partition_starves_behind_a_full_one(bus: Bus) -> None:
    busy, quiet = KEYS[0], next(k for k in KEYS if bus.publish(TOPIC, things("x", key=k))[0].partition != 0)
    bus.publish(TOPIC, [Outgoing(busy, b"busy")] * 100)
    (at,) = bus.publish(TOPIC, things("quiet", key=quiet))
    with bus.consumer(TOPIC) as consumer:
        consumer.seek({at.partition: at.offset})
        polls = [take(consumer, 1) for _ in range(2 * PARTITIONS)]
    assert "quiet" in bodies(list(itertools.chain(*polls)))


def test_a_poll_without_news_ends_when_its_time_is_over(bus: Bus) -> None:
    with bus.consumer(TOPIC) as consumer:
        began = time.monotonic()
        assert consumer.poll(limit=10, timeout_s=0.05) == []
        assert time.monotonic() - began >= 0.05


def publish_one(log: Log, line: Connection) -> None:
    """A process: publishes when it is told to."""
    with closing(log.open()) as bus:
        line.send("ready")
        line.recv()
        bus.publish(TOPIC, things("news"))
        line.send("published")


@pytest.mark.thorough
def test_a_poll_returns_before_its_time_is_over_when_another_process_publishes(
    log: Log, bus: Bus, spawn: Spawn
) -> None:
    _, line = spawn(publish_one, log)
    assert told(line) == "ready"
    with bus.consumer(TOPIC) as consumer:
        assert consumer.poll(limit=10, timeout_s=0) == []
        began = time.monotonic()
        line.send("go")
        assert bodies(consumer.poll(limit=10, timeout_s=LIMIT_S)) == ["news"]
        assert time.monotonic() - began < LIMIT_S
    assert told(line) == "published"


def test_ends_are_the_offsets_after_the_last_records(bus: Bus) -> None:
    with bus.consumer(TOPIC) as consumer:
        assert consumer.ends() == dict.fromkeys(range(PARTITIONS), 0)
        (*_, at) = bus.publish(TOPIC, things("a", "b", "c"))
        assert consumer.ends() == {**dict.fromkeys(range(PARTITIONS), 0), at.partition: 3}


def test_after_a_seek_reading_goes_on_from_there(bus: Bus) -> None:
    (at, *_) = bus.publish(TOPIC, things("a", "b", "c"))
    with bus.consumer(TOPIC) as consumer:
        assert bodies(take(consumer, 3)) == ["a", "b", "c"]
        consumer.seek({at.partition: 1})
        assert bodies(take(consumer, 2)) == ["b", "c"]
        consumer.seek({at.partition: 3})
        assert consumer.poll(limit=10, timeout_s=0.05) == []


@pytest.mark.parametrize("offset", [4, 1000, -1])
def test_a_seek_to_where_the_log_never_was_is_refused_and_changes_nothing(bus: Bus, offset: int) -> None:
    (at, *_) = bus.publish(TOPIC, things("a", "b", "c"))
    with bus.consumer(TOPIC) as consumer:
        with pytest.raises(OffsetGone, match=rf"{TOPIC}\[{at.partition}\] holds offsets 0 to 3, not {offset}"):
            consumer.seek({at.partition: offset})
        assert bodies(take(consumer, 3)) == ["a", "b", "c"]


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
        assert bodies(take(consumer, 1)) == ["a"]
        consumer.seek({at.partition: 1})
        log.cut(at.partition, before=2)
        with pytest.raises(OffsetGone, match="offset 1 is gone, the log starts at 2"):
            consumer.poll(limit=10, timeout_s=LIMIT_S)
