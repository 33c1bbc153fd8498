"""A trajectory reader over a log, records for it, and malformed records."""

from collections.abc import Callable

from palimpsest.common.arrays import pack_float32, pack_int32
from palimpsest.common.bus.port import Bus, Outgoing
from palimpsest.common.bus.sqlite import SqliteBus
from palimpsest.common.messages import (
    DEAD_LETTERS,
    TRAJECTORIES,
    DeadLetter,
    SegmentFlushed,
    TrajectoryDropped,
    TrajectoryFinished,
    decode,
    encode,
)
from palimpsest.common.rejected_record import RejectCause
from palimpsest.common.trajectory import Segment
from palimpsest.common.versions import Version
from palimpsest.services.learner.ingest.trajectory_reader import TrajectoryReader
from tests.learner_parts.ingest import VOCABULARY, Ledger, an_ingest
from tests.records.builders import a_finished, a_segment

NEWEST = Version(5)


def started(
    bus: Bus, *, keep_flushed: bool = False, ended: Callable[[str], None] = lambda _: None
) -> tuple[TrajectoryReader, Ledger]:
    """Return the reader and the ledger of an ingest that has offered four groups."""
    ingest = an_ingest(bus, keep_flushed=keep_flushed, on_resolved=ended)
    ingest.start({}, {}, {}, now=0.0)
    assert ingest.tasks.offer(Version(0), now=0.0) == 4
    return ingest.reader, ingest.ledger


def publish(bus: SqliteBus, *records: TrajectoryFinished | TrajectoryDropped | SegmentFlushed) -> None:
    bus.publish(TRAJECTORIES, [Outgoing(r.group, encode(r), {"trajectory": r.trajectory}) for r in records])


def letters(bus: SqliteBus) -> list[DeadLetter]:
    with bus.consumer(DEAD_LETTERS) as consumer:
        return [decode(DEAD_LETTERS, r.body) for r in consumer.poll(limit=99, timeout_s=0)]


finished = a_finished(0, 0)
segment = finished.segments[0]
BROKEN: dict[str, tuple[RejectCause, dict[str, object]]] = {
    "tokens that end within a token": (RejectCause.LENGTH_MISMATCH, {"tokens": finished.tokens[:-1]}),
    "no tokens": (RejectCause.LENGTH_MISMATCH, {"tokens": b""}),
    "a negative token": (RejectCause.OUT_OF_RANGE, {"tokens": pack_int32([1, -2, 3, 4, 5, 6, 7, 8])}),
    "a token beyond the vocabulary": (RejectCause.OUT_OF_RANGE, {"tokens": pack_int32([1, VOCABULARY, *range(3, 9)])}),
    "a segment beyond the tokens": (RejectCause.LENGTH_MISMATCH, {"segments": (a_segment(2, 9, 0),)}),
    "overlapping segments": (RejectCause.LENGTH_MISMATCH, {"segments": (a_segment(2, 5, 0), a_segment(4, 6, 1))}),
    "an empty segment": (RejectCause.LENGTH_MISMATCH, {"segments": (a_segment(2, 2, 0),)}),
    "too few log-probs": (
        RejectCause.LENGTH_MISMATCH, {"segments": (Segment(2, 6, Version(0), pack_float32([-1.0] * 3)),)},
    ),
    "a log-prob that is not a number": (RejectCause.NOT_FINITE, {"segments": (a_segment(2, 6, 0, float("nan")),)}),
    "an infinite log-prob": (RejectCause.NOT_FINITE, {"segments": (a_segment(2, 6, 0, float("-inf")),)}),
    "a log-prob above 0": (RejectCause.OUT_OF_RANGE, {"segments": (a_segment(2, 6, 0, 0.5),)}),
    "a log-prob that no engine samples": (RejectCause.OUT_OF_RANGE, {"segments": (a_segment(2, 6, 0, -3e38),)}),
    "a negative version": (RejectCause.NEGATIVE_VERSION, {"segments": (a_segment(2, 6, -3),)}),
    "a version of the future": (RejectCause.UNKNOWN_VERSION, {"segments": (a_segment(2, 6, 6),)}),
    "a sampled first token": (RejectCause.LENGTH_MISMATCH, {"segments": (a_segment(0, 6, 0),)}),
    "a reward above 1": (RejectCause.OUT_OF_RANGE, {"reward": 1.5}),
    "a reward below 0": (RejectCause.OUT_OF_RANGE, {"reward": -0.1}),
    "a reward that is not a number": (RejectCause.NOT_FINITE, {"reward": float("nan")}),
    "a temperature of 0": (RejectCause.OUT_OF_RANGE, {"temperature": 0.0}),
    "an infinite temperature": (RejectCause.NOT_FINITE, {"temperature": float("inf")}),
}  # fmt: skip
CONTRADICTING: dict[str, dict[str, object]] = {
    "temperature: 0.01": {"temperature": 0.01},
    "environment: 'hop'": {"environment": "hop"},
    "turns: 5": {"turns": 5},
    "tokens: 65": {"tokens": pack_int32(range(1, 66))},
}
"""Start of the error text -> fields of a trajectory that is valid and not what was offered (SAMPLING, lookup)."""


def flushed(reader: TrajectoryReader) -> list[tuple[str, int]]:
    """Trajectory and offset of each buffered flush."""
    return [(one.record.trajectory, one.offset) for one in reader.flushed]
