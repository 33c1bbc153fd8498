"""Flushes of live trajectories: buffering, replacement, and positions."""

import msgspec
import pytest

from palimpsest.common.bus.sqlite import SqliteBus
from palimpsest.common.messages import (
    DropReason,
    SegmentFlushed,
    TrajectoryDropped,
    encode,
)
from palimpsest.common.rejected_record import RejectCause
from tests.learner_parts.ingest import an_ingest
from tests.learner_parts.interruption import a_flush
from tests.records.builders import a_finished, a_segment
from tests.unit.learner.ingest.reading import BROKEN, NEWEST, flushed, letters, publish, started


def test_flushes_are_kept_with_their_position_until_resolved_and_the_ledger_is_unchanged(
    bus: SqliteBus,
) -> None:
    reader, ledger = started(bus, keep_flushed=True)
    before = ledger.counts()
    publish(bus, a_flush(0, 0), a_flush(0, 1))
    reader.read_all(NEWEST, timeout_s=0)
    assert flushed(reader) == [("g000000/0", 0), ("g000000/1", 1)]
    assert ledger.counts() == before
    partition = next(iter(reader.flushed)).partition
    for offset, one in enumerate(list(reader.flushed)):
        assert reader.offsets()[partition] == offset
        reader.resolve_flushed(one)
    assert reader.offsets() == reader._consumer.ends()
    assert flushed(reader) == []


def test_a_restart_rereads_unresolved_flushes(bus: SqliteBus) -> None:
    reader, ledger = started(bus, keep_flushed=True)
    publish(bus, a_flush(0, 0), a_flush(0, 1))
    reader.read_all(NEWEST, timeout_s=0)
    reader.resolve_flushed(next(iter(reader.flushed)))
    again = an_ingest(bus, keep_flushed=True)
    again.ledger.restore(ledger.state(), now=0.0)
    again.start(reader.offsets(), {}, {}, now=0.0)
    again.reader.read_all(NEWEST, timeout_s=0)
    assert flushed(again.reader) == [("g000000/1", 1)]


def test_flushes_do_not_block_offsets_if_they_are_not_scored(bus: SqliteBus) -> None:
    reader, _ = started(bus)
    publish(bus, a_flush(0, 0))
    reader.read_all(NEWEST, timeout_s=0)
    assert flushed(reader) == []
    assert reader.offsets() == reader._consumer.ends()


def test_a_later_flush_replaces_the_earlier_one(bus: SqliteBus) -> None:
    reader, _ = started(bus, keep_flushed=True)
    publish(bus, a_flush(0, 0, tokens=6), a_flush(0, 0, tokens=9, segments=(a_segment(2, 6, 0), a_segment(6, 9, 1))))
    reader.read_all(NEWEST, timeout_s=0)
    assert flushed(reader) == [("g000000/0", 1)]
    assert reader.offsets()[next(iter(reader.flushed)).partition] == 1


@pytest.mark.parametrize("finished_first", [False, True])
def test_a_finished_trajectory_replaces_its_flushes_in_either_order(bus: SqliteBus, finished_first: bool) -> None:
    reader, _ = started(bus, keep_flushed=True)
    records = [a_flush(0, 0), a_flush(0, 0, tokens=[9, 9, 9, 9, 9, 9]), a_finished(0, 0)]
    publish(bus, *(records[::-1] if finished_first else records))
    reader.read_all(NEWEST, timeout_s=0)
    assert flushed(reader) == []
    (arrived,) = reader.arrived.values()
    assert reader.offsets()[arrived.partition] == (0 if finished_first else 2)
    reader.resolve(arrived)
    assert reader.offsets() == reader._consumer.ends()


def test_a_dropped_or_resolved_trajectory_discards_its_flushes_and_reports_it(bus: SqliteBus) -> None:
    ended: list[str] = []
    reader, ledger = started(bus, keep_flushed=True, ended=ended.append)
    publish(bus, a_flush(0, 0), a_flush(0, 1), a_flush(1, 0), a_finished(1, 1))
    reader.read_all(NEWEST, timeout_s=0)
    assert (len(reader.flushed), ended) == (3, [])
    publish(bus, TrajectoryDropped("test", "g000000/0", "g000000", "a", DropReason.ENGINE_FAILED, "?"), a_flush(0, 0))
    reader.read_all(NEWEST, timeout_s=0)
    assert [name for name, _ in flushed(reader)] == ["g000000/1", "g000001/0"]
    for trajectory in ledger.expire(now=1e9)[:2]:
        reader.forget(trajectory)
    publish(bus, a_flush(0, 1), a_flush(1, 0))  # its worker does not know of the drop yet
    reader.read_all(NEWEST, timeout_s=0)
    reader.resolve(reader.arrived["g000001/1"])
    assert flushed(reader) == []
    assert ended == ["g000000/0", "g000000/1", "g000001/0", "g000001/1"]
    assert reader.offsets() == reader._consumer.ends()


FLUSH = a_flush(0, 0)
BROKEN_FLUSHES: dict[str, tuple[RejectCause, SegmentFlushed]] = {
    what: (cause, msgspec.structs.replace(FLUSH, **changes))
    for what, (cause, changes) in BROKEN.items()
    if changes.keys() <= {"tokens", "segments", "temperature"}
} | {
    "another run": (RejectCause.WRONG_RUN, a_flush(0, 0, run="another")),
    "a group that was never offered": (RejectCause.NEVER_OFFERED, a_flush(77, 0)),
    "a trajectory of another group": (RejectCause.NEVER_OFFERED, msgspec.structs.replace(FLUSH, group="g000001")),
    "a trajectory without a number": (
        RejectCause.NEVER_OFFERED,
        msgspec.structs.replace(FLUSH, trajectory="g000000/x"),
    ),
}


@pytest.mark.parametrize("what", BROKEN_FLUSHES)
def test_a_malformed_flush_is_dead_lettered_and_its_trajectory_stays_pending(bus: SqliteBus, what: str) -> None:
    reader, ledger = started(bus, keep_flushed=True)
    before, (cause, broken) = ledger.counts(), BROKEN_FLUSHES[what]
    publish(bus, broken)
    reader.read_all(NEWEST, timeout_s=0)
    (letter,) = letters(bus)
    assert (letter.cause, letter.body) == (cause, encode(broken))
    assert (flushed(reader), ledger.counts()) == ([], before)
    assert reader.offsets() == reader._consumer.ends()
    publish(bus, a_finished(0, 0))
    reader.read_all(NEWEST, timeout_s=0)
    assert list(reader.arrived) == ["g000000/0"]
