"""Contract of every bus adapter: records, offsets, seeking. Tests about several processes start real processes."""

import itertools
import threading
import time
from collections import Counter, defaultdict
from contextlib import closing
from multiprocessing.connection import Connection

import pytest
from confluent_kafka import Producer

from palimpsest.common.bus.decoding import message_in
from palimpsest.common.bus.offline import read_existing
from palimpsest.common.bus.port import UNREADABLE, Bus, OffsetGone, Outgoing, Position, Record, partition_of
from palimpsest.common.rejected_record import RejectedRecord
from tests.contract.logs import (
    GROUP,
    KEYS,
    LIMIT_S,
    PARTITIONS,
    TOPIC,
    KafkaLog,
    Log,
    Spawn,
    SqliteLog,
    bodies,
    poll_until,
    read_all,
    receive,
    receive_all,
    take,
    things,
)

BATCH = 25


def test_a_record_is_read_unchanged(bus: Bus) -> None:
    headers = {"trajectory": "g000007/3", "ä": "größer als π ≈ 3\n"}
    (at,) = bus.publish(TOPIC, [Outgoing("g000007", b"\x00\xffbody", headers)])
    assert read_all(bus) == [Record(TOPIC, at.partition, at.offset, "g000007", b"\x00\xffbody", headers)]


@pytest.mark.parametrize("body", [b"", b"\x00", bytes(range(256))])
def test_a_body_may_hold_any_bytes(bus: Bus, body: bytes) -> None:
    bus.publish(TOPIC, [Outgoing("", body)])
    assert [(record.key, record.body) for record in read_all(bus)] == [("", body)]


def test_a_record_of_five_megabytes_is_read_unchanged(bus: Bus) -> None:
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


def test_publishing_no_records_does_nothing(bus: Bus) -> None:
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
    """Process body: publish batches under shared keys without pauses."""
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
    assert [receive(line) for line in lines] == ["ready"] * 3
    for line in lines:
        line.send("go")
    assert [receive(line) for line in lines] == ["done"] * 3
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
    """Process body: publish one record per key and send the partitions."""
    with closing(log.open()) as bus:
        line.send([at.partition for at in bus.publish(TOPIC, [Outgoing(key, b"") for key in KEYS])])


@pytest.mark.thorough
def test_every_process_publishes_a_key_to_the_same_partition(log: Log, bus: Bus, spawn: Spawn) -> None:
    ours = [at.partition for at in bus.publish(TOPIC, [Outgoing(key, b"") for key in KEYS])]
    assert set(ours) == set(range(PARTITIONS))
    assert receive(spawn(publish_keys, log)[1]) == ours


def publish_forever(log: Log, line: Connection) -> None:
    """Process body: publish batches forever, and send each batch number after `publish` returns."""
    with closing(log.open()) as bus:
        for batch in itertools.count():
            bus.publish(TOPIC, [Outgoing("k", f"{batch} {i}".encode() + bytes(2000)) for i in range(BATCH)])
            line.send(batch)


@pytest.mark.thorough
@pytest.mark.parametrize("after", [0, 7])
def test_a_killed_publisher_leaves_every_acknowledged_record_in_order(log: Log, spawn: Spawn, after: int) -> None:
    process, line = spawn(publish_forever, log)
    while receive(line) < after:
        pass
    process.kill()
    acknowledged = max(receive_all(line), default=after)
    with closing(log.open()) as bus:
        found = [record.body.rstrip(b"\0").decode() for record in read_all(bus)]
        batches, rest = divmod(len(found), BATCH)
        assert rest == 0 or not isinstance(log, SqliteLog)  # in SQLite a batch is one transaction
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


def test_a_poll_returns_at_most_limit_records_and_the_next_continues_after_them(bus: Bus) -> None:
    bus.publish(TOPIC, things(*map(str, range(10))))
    with bus.consumer(TOPIC) as consumer:
        polls: list[list[str]] = []
        while sum(map(len, polls)) < 10:
            polls.append(bodies(consumer.poll(limit=4, timeout_s=LIMIT_S)))
        assert consumer.poll(limit=4, timeout_s=0.05) == []
    assert max(map(len, polls)) <= 4
    assert list(itertools.chain(*polls)) == list(map(str, range(10)))


def test_a_full_partition_does_not_starve_the_others(bus: Bus) -> None:
    busy, quiet = KEYS[0], next(k for k in KEYS if bus.publish(TOPIC, things("x", key=k))[0].partition != 0)
    bus.publish(TOPIC, [Outgoing(busy, b"busy")] * 100)
    (at,) = bus.publish(TOPIC, things("quiet", key=quiet))
    with bus.consumer(TOPIC) as consumer:
        consumer.seek({at.partition: at.offset})
        polls = [take(consumer, 1) for _ in range(2 * PARTITIONS)]
    assert "quiet" in bodies(list(itertools.chain(*polls)))


def test_a_poll_without_records_ends_after_its_timeout(bus: Bus) -> None:
    with bus.consumer(TOPIC) as consumer:
        began = time.monotonic()
        assert consumer.poll(limit=10, timeout_s=0.05) == []
        assert time.monotonic() - began >= 0.05


def publish_one(log: Log, line: Connection) -> None:
    """Process body: publish one record after a message arrives."""
    with closing(log.open()) as bus:
        line.send("ready")
        line.recv()
        bus.publish(TOPIC, things("news"))
        line.send("published")


@pytest.mark.thorough
def test_a_poll_returns_before_its_timeout_when_another_process_publishes(log: Log, bus: Bus, spawn: Spawn) -> None:
    _, line = spawn(publish_one, log)
    assert receive(line) == "ready"
    with bus.consumer(TOPIC) as consumer:
        assert consumer.poll(limit=10, timeout_s=0) == []
        began = time.monotonic()
        line.send("go")
        assert bodies(consumer.poll(limit=10, timeout_s=LIMIT_S)) == ["news"]
        assert time.monotonic() - began < LIMIT_S
    assert receive(line) == "published"


def test_ends_are_the_offsets_after_the_last_records(bus: Bus) -> None:
    with bus.consumer(TOPIC) as consumer:
        assert consumer.ends() == dict.fromkeys(range(PARTITIONS), 0)
        (*_, at) = bus.publish(TOPIC, things("a", "b", "c"))
        assert consumer.ends() == {**dict.fromkeys(range(PARTITIONS), 0), at.partition: 3}


def test_the_lag_is_the_number_of_records_not_returned_yet(bus: Bus) -> None:
    (at, *_) = bus.publish(TOPIC, things("a", "b", "c", "d"))
    with bus.consumer(TOPIC) as consumer:
        assert bodies(take(consumer, 1)) == ["a"]
        assert consumer.lag() == 3
        assert bodies(take(consumer, 3)) == ["b", "c", "d"]
        assert consumer.lag() == 0
        consumer.seek({at.partition: 2})
        assert consumer.lag() == 2


def test_the_lag_of_a_group_member_counts_its_partitions(bus: Bus) -> None:
    bus.publish(TOPIC, [Outgoing(key, b"x") for key in KEYS])
    with bus.consumer(TOPIC, group="readers", member="only") as consumer:
        assert consumer.lag() == 0
        take(consumer, 1)
        assert consumer.lag() == len(KEYS) - 1


def test_reading_continues_from_the_offset_of_a_seek(bus: Bus) -> None:
    (at, *_) = bus.publish(TOPIC, things("a", "b", "c"))
    with bus.consumer(TOPIC) as consumer:
        assert bodies(take(consumer, 3)) == ["a", "b", "c"]
        consumer.seek({at.partition: 1})
        assert bodies(take(consumer, 2)) == ["b", "c"]
        consumer.seek({at.partition: 3})
        assert consumer.poll(limit=10, timeout_s=0.05) == []


@pytest.mark.parametrize("offset", [4, 1000, -1])
def test_a_seek_out_of_range_is_refused_and_changes_nothing(bus: Bus, offset: int) -> None:
    (at, *_) = bus.publish(TOPIC, things("a", "b", "c"))
    with bus.consumer(TOPIC) as consumer:
        with pytest.raises(OffsetGone, match=rf"{TOPIC}\[{at.partition}\] holds offsets 0 to 3, not {offset}"):
            consumer.seek({at.partition: offset})
        assert bodies(take(consumer, 3)) == ["a", "b", "c"]


def test_a_seek_in_a_missing_partition_is_refused(bus: Bus) -> None:
    with bus.consumer(TOPIC) as consumer, pytest.raises(OffsetGone, match=f"{TOPIC} has no partition {PARTITIONS}"):
        consumer.seek({PARTITIONS: 0})


def test_a_seek_to_a_deleted_offset_is_refused(log: Log, bus: Bus) -> None:
    (at, *_) = bus.publish(TOPIC, things("a", "b", "c"))
    log.cut(at.partition, before=2)
    with bus.consumer(TOPIC) as consumer, pytest.raises(OffsetGone, match="holds offsets 2 to 3, not 1"):
        consumer.seek({at.partition: 1})


def test_a_reader_gets_an_error_and_skips_nothing_if_retention_deletes_its_next_record(log: Log, bus: Bus) -> None:
    (at, *_) = bus.publish(TOPIC, things("a", "b", "c"))
    with bus.consumer(TOPIC) as consumer:
        assert bodies(take(consumer, 1)) == ["a"]
        consumer.seek({at.partition: 1})
        log.cut(at.partition, before=2)
        with pytest.raises(OffsetGone, match="offset 1 is gone, the log starts at 2"):
            consumer.poll(limit=10, timeout_s=LIMIT_S)


KAFKA = pytest.mark.parametrize("log", [pytest.param("kafka", marks=pytest.mark.servers)], indirect=True)


@KAFKA
def test_transactions_and_batches_of_other_programs_are_read_or_passed_over(log: KafkaLog, bus: Bus) -> None:
    """The end of a transaction has an offset and no record; lz4 and snappy are not installed."""
    bus.publish(TOPIC, things("first"))
    settings = {"bootstrap.servers": log.servers, "transactional.id": log.prefix}
    producer, partition = Producer(settings), partition_of("k", PARTITIONS)
    producer.init_transactions()
    for end in (producer.commit_transaction, producer.abort_transaction):
        producer.begin_transaction()
        producer.produce(log.prefix + TOPIC, end.__name__.encode(), b"k", partition=partition)
        producer.flush()
        end()
    for codec in ("gzip", "zstd", "lz4", "snappy"):
        # a flush sends what has lingered, in one batch
        foreign = Producer({"bootstrap.servers": log.servers, "compression.type": codec, "linger.ms": 60_000})
        for _ in range(2):
            foreign.produce(
                log.prefix + TOPIC, codec.encode() + bytes(1000), headers={"h": b"\xff"}, partition=partition
            )
            foreign.produce(log.prefix + TOPIC, None, None, partition=partition)
            assert foreign.flush(LIMIT_S) == 0
    producer.begin_transaction()
    producer.produce(log.prefix + TOPIC, b"last", b"k", partition=partition)
    producer.commit_transaction()
    with bus.consumer(TOPIC) as consumer, bus.consumer(TOPIC, group=GROUP, member="m") as member:
        read = poll_until(lambda: consumer.positions() == consumer.ends(), consumer)
        commonly = poll_until(lambda: member.positions() == consumer.ends(), member)
        consumer.seek({partition: 2})  # the offset of a marker
        again = poll_until(lambda: consumer.positions() == consumer.ends(), consumer)
    names = [record.body.rstrip(b"\0").decode() or record.headers.get(UNREADABLE, "empty") for record in read]
    assert names[:3] == ["first", "commit_transaction", "abort_transaction"]
    assert names[3:11] == ["gzip", "empty", "gzip", "empty", "zstd", "empty", "zstd", "empty"]
    assert [("UnsupportedCodecError" in name, "offsets" in name) for name in names[11:-1]] == [(True, True)] * 4
    assert names[-1] == "last"
    assert commonly == read
    assert again == read[2:]
    assert list(read_existing(bus, TOPIC)) == read
    for record in read[11:-1]:
        with pytest.raises(RejectedRecord, match="cannot be read: UnsupportedCodecError"):
            message_in(record)
