"""Contract of `read_existing` on every adapter: it reads each existing record once."""

from palimpsest.common.bus.offline import read_existing
from palimpsest.common.bus.port import Bus, Outgoing
from tests.contract.logs import TOPIC, Log


def fill(bus: Bus, records: int) -> dict[int, int]:
    """Publish records. Returns the end offset of each partition."""
    bus.publish(TOPIC, [Outgoing(f"key {i}", str(i).encode()) for i in range(records)])
    with bus.consumer(TOPIC) as consumer:
        return consumer.ends()


def test_every_existing_record_is_read_once(bus: Bus) -> None:
    assert list(read_existing(bus, TOPIC)) == []
    fill(bus, 5000)  # more than one poll returns
    assert sorted(int(record.body) for record in read_existing(bus, TOPIC)) == list(range(5000))


def test_records_published_during_the_read_are_not_read(bus: Bus) -> None:
    fill(bus, 10)
    reading = read_existing(bus, TOPIC)
    first = next(reading)
    fill(bus, 10)
    assert len([first, *reading]) == 10


def test_reading_starts_at_the_given_offsets_and_else_at_the_first_record(bus: Bus) -> None:
    ends = fill(bus, 60)
    found = list(read_existing(bus, TOPIC, {0: ends[0] - 2, 1: ends[1]}))
    assert [record.offset for record in found if record.partition == 0] == [ends[0] - 2, ends[0] - 1]
    assert [record.offset for record in found if record.partition == 1] == []
    assert [record.offset for record in found if record.partition == 2] == list(range(ends[2]))


def test_deleted_records_do_not_block_the_read(log: Log, bus: Bus) -> None:
    ends = fill(bus, 60)
    log.cut(0, ends[0])
    log.cut(1, 5)
    found = list(read_existing(bus, TOPIC, {1: 2}))
    assert [record.offset for record in found if record.partition == 0] == []
    assert [record.offset for record in found if record.partition == 1] == list(range(5, ends[1]))
