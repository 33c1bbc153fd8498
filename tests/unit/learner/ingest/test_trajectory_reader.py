"""The trajectory reader accounts for every record of the log."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from palimpsest.common import logs
from palimpsest.common.arrays import pack_float32, pack_int32
from palimpsest.common.bus.port import Bus, Outgoing
from palimpsest.common.bus.sqlite import SqliteBus
from palimpsest.common.messages import (
    DEAD_LETTERS,
    TOPICS,
    TRAJECTORIES,
    DeadLetter,
    DropReason,
    SegmentFlushed,
    TrajectoryDropped,
    TrajectoryFinished,
    decode,
    encode,
)
from palimpsest.common.rejected_record import RejectCause
from palimpsest.common.trajectory import MalformedTrajectory, Segment
from palimpsest.common.user_error import UserError
from palimpsest.common.versions import Version
from palimpsest.services.learner import instruments
from palimpsest.services.learner.buffer.ledger import ArrivalStatus, TrajectoryLedger
from palimpsest.services.learner.ingest.trajectory_reader import TrajectoryReader
from palimpsest.services.learner.ingest.validation import check_finished
from tests.learner_parts.ingest import Ledger, an_ingest
from tests.learner_parts.interruption import a_flush
from tests.records.builders import a_finished, a_segment

NEWEST = Version(5)


@pytest.fixture
def bus(tmp_path: Path) -> Iterator[SqliteBus]:
    bus = SqliteBus(tmp_path / "bus.sqlite")
    bus.create_topics(dict.fromkeys(TOPICS, 2))
    yield bus
    bus.close()


def started(
    bus: Bus, *, keep_flushed: bool = False, ended: Callable[[str], None] = lambda _: None
) -> tuple[TrajectoryReader, Ledger]:
    """The reader of an ingest that has offered four groups."""
    ingest = an_ingest(bus, keep_flushed=keep_flushed, on_resolved=ended)
    ingest.start({}, {}, {}, now=0.0)
    assert ingest.tasks.offer(Version(0), now=0.0) == 4
    return ingest.reader, ingest.ledger


def publish(bus: SqliteBus, *records: TrajectoryFinished | TrajectoryDropped | SegmentFlushed) -> None:
    bus.publish(TRAJECTORIES, [Outgoing(r.group, encode(r), {"trajectory": r.trajectory}) for r in records])


def letters(bus: SqliteBus) -> list[DeadLetter]:
    with bus.consumer(DEAD_LETTERS) as consumer:
        return [decode(DEAD_LETTERS, r.body) for r in consumer.poll(limit=99, timeout_s=0)]


def test_finished_and_dropped_trajectories_reach_the_ledger(bus: SqliteBus) -> None:
    reader, ledger = started(bus)
    publish(
        bus,
        a_finished(0, 0),
        a_finished(0, 1),
        TrajectoryDropped("test", "g000001/0", "g000001", "worker-0", DropReason.ENVIRONMENT_FAILED, "?"),
    )
    reader.read_all(NEWEST, timeout_s=0)
    assert ledger.complete() == 1
    assert ledger.counts()["dropped"] == {"environment_failed": 1}
    assert sorted(reader.arrived) == ["g000000/0", "g000000/1"]
    assert reader.sampled_tokens == 8


def test_a_repeated_trajectory_counts_once(bus: SqliteBus) -> None:
    reader, ledger = started(bus)
    publish(bus, a_finished(0, 0, reward=0.25), a_finished(0, 0, reward=0.75), a_finished(0, 0))
    reader.read_all(NEWEST, timeout_s=0)
    assert ledger.waiting() == 1
    assert reader.arrived["g000000/0"].record.reward == 0.25
    assert letters(bus) == []


def test_offsets_stop_at_the_first_untrained_trajectory(bus: SqliteBus) -> None:
    reader, _ = started(bus)
    publish(bus, a_finished(0, 0), a_finished(0, 1))
    reader.read_all(NEWEST, timeout_s=0)
    partition = reader.arrived["g000000/0"].partition
    assert reader.offsets()[partition] == 0
    reader.resolve(reader.arrived["g000000/1"])
    assert reader.offsets()[partition] == 0
    reader.resolve(reader.arrived["g000000/0"])
    assert reader.offsets()[partition] == 2


def test_a_restart_rereads_unresolved_trajectories_and_adopts_later_offers(bus: SqliteBus) -> None:
    before = an_ingest(bus)
    before.start({}, {}, {}, now=0.0)
    before.tasks.offer(Version(0), now=0.0)
    publish(bus, a_finished(0, 0), a_finished(0, 1), a_finished(1, 0))
    before.reader.read_all(NEWEST, timeout_s=0)
    assert before.ledger.take_batch() is None
    state, offsets, task_offsets = before.ledger.state(), before.reader.offsets(), before.tasks.offsets()
    before.ledger.expire(now=1e9)  # the old process offers more before it exits
    assert before.tasks.offer(Version(1), now=0.0) > 0
    before.close()

    again = an_ingest(bus)
    again.ledger.restore(state, now=0.0)
    again.start(offsets, task_offsets, {}, now=0.0)
    again.reader.read_all(NEWEST, timeout_s=0)
    assert sorted(again.reader.arrived) == ["g000000/0", "g000000/1", "g000001/0"]
    assert again.ledger.counts()["offered"] == before.ledger.counts()["offered"]
    assert again.ledger.next_index == before.ledger.next_index


def test_a_restart_from_the_groups_committed_offsets_would_lose_trajectories(bus: SqliteBus) -> None:
    """Committed offsets of a consumer group say what was read; the checkpoint's offsets say what was trained."""
    before, ledger = started(bus)
    publish(bus, a_finished(0, 0), a_finished(0, 1))
    before.read_all(NEWEST, timeout_s=0)
    read = {partition: end for partition, end in before._consumer.ends().items() if end}
    for offsets, found in ((before.offsets(), 2), (read, 0)):
        again = an_ingest(bus)
        again.ledger.restore(ledger.state(), now=0.0)
        again.start(offsets, {}, {}, now=0.0)
        again.reader.read_all(NEWEST, timeout_s=0)
        assert again.ledger.waiting() == found
        again.close()


class Forgetful(Ledger):
    """A ledger that never recognizes an id."""

    def _find(self, group: str, trajectory: str) -> Any:
        found = super()._find(group, trajectory)
        if found.status is not ArrivalStatus.DUPLICATE or group not in self._open:
            return found
        sample = int(trajectory.rpartition("/")[2])
        return replace(found, status=ArrivalStatus.NEW, group=self._open[group], sample=sample)


@pytest.mark.parametrize(("kind", "reward"), [(TrajectoryLedger, 0.25), (Forgetful, 0.75)])
def test_without_ids_a_repeated_record_would_replace_the_first(
    bus: SqliteBus, kind: type[Ledger], reward: float
) -> None:
    ingest = an_ingest(bus, ledger=kind)
    ingest.start({}, {}, {}, now=0.0)
    ingest.tasks.offer(Version(0), now=0.0)
    publish(bus, a_finished(0, 0, reward=0.25), a_finished(0, 0, reward=0.75))
    ingest.reader.read_all(NEWEST, timeout_s=0)
    assert ingest.reader.arrived["g000000/0"].record.reward == reward


def test_a_truncated_log_stops_the_run(bus: SqliteBus) -> None:
    with pytest.raises(UserError, match="would lose trajectories silently"):
        an_ingest(bus).start({0: 17}, {}, {}, now=0.0)


finished = a_finished(0, 0)
segment = finished.segments[0]
BROKEN: dict[str, tuple[RejectCause, dict[str, object]]] = {
    "a token count that is no whole number": (RejectCause.LENGTH_MISMATCH, {"tokens": finished.tokens[:-1]}),
    "no tokens": (RejectCause.LENGTH_MISMATCH, {"tokens": b""}),
    "a negative token": (RejectCause.OUT_OF_RANGE, {"tokens": pack_int32([1, -2, 3, 4, 5, 6, 7, 8])}),
    "a segment beyond the tokens": (RejectCause.LENGTH_MISMATCH, {"segments": (a_segment(2, 9, 0),)}),
    "overlapping segments": (RejectCause.LENGTH_MISMATCH, {"segments": (a_segment(2, 5, 0), a_segment(4, 6, 1))}),
    "an empty segment": (RejectCause.LENGTH_MISMATCH, {"segments": (a_segment(2, 2, 0),)}),
    "too few log-probs": (
        RejectCause.LENGTH_MISMATCH, {"segments": (Segment(2, 6, Version(0), pack_float32([-1.0] * 3)),)},
    ),
    "a log-prob that is not a number": (RejectCause.NOT_FINITE, {"segments": (a_segment(2, 6, 0, float("nan")),)}),
    "an infinite log-prob": (RejectCause.NOT_FINITE, {"segments": (a_segment(2, 6, 0, float("-inf")),)}),
    "a log-prob above 0": (RejectCause.OUT_OF_RANGE, {"segments": (a_segment(2, 6, 0, 0.5),)}),
    "a negative version": (RejectCause.NEGATIVE_VERSION, {"segments": (a_segment(2, 6, -3),)}),
    "a version of the future": (RejectCause.UNKNOWN_VERSION, {"segments": (a_segment(2, 6, 6),)}),
    "a sampled first token": (RejectCause.LENGTH_MISMATCH, {"segments": (a_segment(0, 6, 0),)}),
    "a reward above 1": (RejectCause.OUT_OF_RANGE, {"reward": 1.5}),
    "a reward below 0": (RejectCause.OUT_OF_RANGE, {"reward": -0.1}),
    "a reward that is not a number": (RejectCause.NOT_FINITE, {"reward": float("nan")}),
    "a temperature of 0": (RejectCause.OUT_OF_RANGE, {"temperature": 0.0}),
    "an infinite temperature": (RejectCause.NOT_FINITE, {"temperature": float("inf")}),
}  # fmt: skip


def counted(cause: RejectCause) -> float:
    """Value of the Prometheus counter of dead-lettered records with this cause."""
    return instruments.DEAD_LETTERS.labels(cause.value, TRAJECTORIES)._value.get()


@pytest.mark.parametrize("what", BROKEN)
def test_an_unusable_record_is_dead_lettered_with_its_cause_and_the_run_continues(bus: SqliteBus, what: str) -> None:
    reader, ledger = started(bus)
    cause, changes = BROKEN[what]
    broken, before = msgspec.structs.replace(finished, **changes), counted(cause)
    with pytest.raises(MalformedTrajectory):
        check_finished(broken, NEWEST)
    publish(bus, broken, a_finished(0, 1))
    reader.read_all(NEWEST, timeout_s=0)
    (letter,) = letters(bus)
    assert (letter.cause, letter.topic, letter.key, letter.body) == (cause, TRAJECTORIES, "g000000", encode(broken))
    assert letter.headers == {"trajectory": "g000000/0"}
    assert letter.reason
    assert letter.buried_at > 0
    assert counted(cause) == before + 1
    assert ledger.counts()["dead_lettered"] == 1
    assert ledger.counts()["pending"] == 7
    assert list(reader.arrived) == ["g000000/1"]


def test_a_record_of_another_release_is_dead_lettered_as_such(bus: SqliteBus) -> None:
    reader, _ = started(bus)
    newer = msgspec.msgpack.encode({"type": "trajectory_finished/2", "run": "test"})
    bus.publish(TRAJECTORIES, [Outgoing("g000000", newer, {"trajectory": "g000000/0"})])
    reader.read_all(NEWEST, timeout_s=0)
    (letter,) = letters(bus)
    assert letter.cause is RejectCause.UNKNOWN_SCHEMA
    assert "trajectory_finished/2" in letter.reason


def test_a_record_whose_body_is_lost_is_dead_lettered_with_its_claim(bus: SqliteBus) -> None:
    reader, ledger = started(bus)
    headers = {"trajectory": "g000000/0", "claim": "c3" * 32, "claim_lost": "the body c3c3 is not in the store"}
    bus.publish(TRAJECTORIES, [Outgoing("g000000", b"", headers)])
    reader.read_all(NEWEST, timeout_s=0)
    (letter,) = letters(bus)
    assert (letter.cause, letter.headers) == (RejectCause.MISSING_CLAIM, headers)
    assert "the body c3c3 is not in the store" in letter.reason
    assert ledger.counts()["dead_lettered"] == 1


def test_garbage_that_names_a_trajectory_does_not_replace_it(bus: SqliteBus) -> None:
    reader, ledger = started(bus)
    bus.publish(TRAJECTORIES, [Outgoing("g000000", b"garbage", {"trajectory": "g000000/1"})])
    publish(bus, a_finished(0, 0))
    reader.read_all(NEWEST, timeout_s=0)
    assert (ledger.counts()["dead_lettered"], ledger.complete()) == (1, 1)
    publish(bus, a_finished(0, 1))
    reader.read_all(NEWEST, timeout_s=0)
    assert ledger.counts() == {"offered": 8, "trained": 0, "dropped": {}, "dead_lettered": 0, "pending": 8}
    assert sorted(reader.arrived) == ["g000000/0", "g000000/1"]
    assert reader.offsets()[reader.arrived["g000000/0"].partition] == 1, "both wait to be trained on"
    assert len(letters(bus)) == 1


def test_a_valid_record_of_a_closed_group_is_a_duplicate(bus: SqliteBus, capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("learner", "info", "json")
    reader, ledger = started(bus)
    bus.publish(TRAJECTORIES, [Outgoing("g000000", b"garbage", {"trajectory": f"g000000/{s}"}) for s in range(2)])
    reader.read_all(NEWEST, timeout_s=0)
    before, duplicates = ledger.counts(), instruments.DUPLICATES._value.get()
    publish(bus, a_finished(0, 1))
    reader.read_all(NEWEST, timeout_s=0)
    assert ledger.counts() == before
    assert ledger.counts()["dead_lettered"] == 2
    assert instruments.DUPLICATES._value.get() == duplicates + 1
    assert '"group": "closed", "event": "duplicate"' in capsys.readouterr().err
    assert reader.offsets() == reader._consumer.ends()


def test_undecodable_bytes_are_kept_in_full_and_attributed_by_their_header(bus: SqliteBus) -> None:
    reader, ledger = started(bus)
    bus.publish(TRAJECTORIES, [Outgoing("g000002", b"\x00garbage", {"trajectory": "g000002/1"})])
    bus.publish(TRAJECTORIES, [Outgoing("?", b"\xff\xfe")])
    reader.read_all(NEWEST, timeout_s=0)
    assert len(letters(bus)) == 2
    assert ledger.counts()["dead_lettered"] == 1
    with bus.consumer(DEAD_LETTERS) as consumer:
        bodies = {decode(DEAD_LETTERS, r.body).body for r in consumer.poll(limit=9, timeout_s=0)}
    assert bodies == {b"\x00garbage", b"\xff\xfe"}


def test_valid_records_of_another_run_change_nothing(bus: SqliteBus) -> None:
    reader, ledger = started(bus)
    publish(bus, a_finished(0, 0, run="another"), a_finished(77, 0), a_finished(0, 9))
    reader.read_all(NEWEST, timeout_s=0)
    assert Counter(letter.cause for letter in letters(bus)) == {RejectCause.WRONG_RUN: 1, RejectCause.NEVER_OFFERED: 2}
    assert ledger.counts() == {"offered": 8, "trained": 0, "dropped": {}, "dead_lettered": 0, "pending": 8}
    assert reader.offsets() == reader._consumer.ends()


def test_an_id_of_thousands_of_digits_is_dead_lettered(bus: SqliteBus) -> None:
    reader, _ = started(bus)
    long = f"g000000/{'9' * 5000}"
    publish(bus, msgspec.structs.replace(finished, trajectory=long))
    reader.read_all(NEWEST, timeout_s=0)
    assert [letter.cause for letter in letters(bus)] == [RejectCause.NEVER_OFFERED]


def test_every_record_advances_the_offsets(bus: SqliteBus) -> None:
    """An unusable record must not be read again forever."""
    reader, _ = started(bus)
    bus.publish(TRAJECTORIES, [Outgoing(f"k{i}", b"junk") for i in range(20)])
    publish(bus, a_finished(77, 0), a_finished(0, 0), a_finished(0, 0))
    reader.read_all(NEWEST, timeout_s=0)
    reader.resolve(reader.arrived["g000000/0"])
    with bus.consumer(TRAJECTORIES) as consumer:
        assert reader.offsets() == consumer.ends()


def flushed(reader: TrajectoryReader) -> list[tuple[str, int]]:
    """Trajectory and offset of each buffered flush."""
    return [(one.record.trajectory, one.offset) for one in reader.flushed]


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


def test_pending_counts_awaited_and_untrained_trajectories(bus: SqliteBus) -> None:
    reader, _ = started(bus)
    publish(bus, a_finished(0, 0), TrajectoryDropped("test", "g000000/1", "g000000", "a", DropReason.DEADLINE, "?"))
    reader.read_all(NEWEST, timeout_s=0)
    pending = reader.is_pending
    assert pending("g000000/0")
    assert not pending("g000000/1")
    assert pending("g000001/0")
    assert not pending("g000077/0")
    assert not pending("g000001/2")
    assert not pending("g000001/00")
    assert not pending("nonsense")


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


def test_read_until_reads_every_record_up_to_the_positions(bus: SqliteBus) -> None:
    reader, _ = started(bus, keep_flushed=True)
    publish(bus, *(a_flush(group, sample) for group in range(4) for sample in range(2)))
    with bus.consumer(TRAJECTORIES) as consumer:
        ends = consumer.ends()
    assert reader.read_until(ends, NEWEST, deadline_s=10)
    assert len(reader.flushed) == 8
    assert reader.read_until({}, NEWEST, deadline_s=0)
    assert reader.read_until(ends, NEWEST, deadline_s=0), "records read before need not be read again"
    assert reader.read_until({0: 10**9, 99: 1}, NEWEST, deadline_s=0), "positions beyond the end of the log are ignored"


def test_read_until_returns_false_for_positions_not_reached_in_time(
    bus: SqliteBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, _ = started(bus, keep_flushed=True)
    publish(bus, a_flush(0, 0))
    with bus.consumer(TRAJECTORIES) as consumer:
        ends = consumer.ends()
    monkeypatch.setattr(reader._consumer, "poll", lambda **_: [])  # an outage
    assert not reader.read_until(ends, NEWEST, deadline_s=0.01)
