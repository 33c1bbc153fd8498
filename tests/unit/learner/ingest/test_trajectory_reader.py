"""The learner's reading of the log: every record accounted for."""

import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest

from palimpsest.common import logs
from palimpsest.common.arrays import pack_float32, pack_int32
from palimpsest.common.bus.port import Bus, Outgoing, Position
from palimpsest.common.bus.sqlite import SqliteBus
from palimpsest.common.messages import (
    DEAD_LETTERS,
    OLD_LOGPROBS,
    TASKS,
    TOPICS,
    TRAJECTORIES,
    DeadLetter,
    DropReason,
    GroupOffered,
    SegmentFlushed,
    TrajectoryDropped,
    TrajectoryFinished,
    decode,
    encode,
)
from palimpsest.common.rejected_record import RejectCause
from palimpsest.common.trajectory import Malformed, Segment
from palimpsest.common.user_error import ExitCode, UserError
from palimpsest.common.versions import Version
from palimpsest.services.learner import instruments
from palimpsest.services.learner.buffer.ledger import ArrivalStatus, TrajectoryLedger
from palimpsest.services.learner.ingest.trajectory_reader import ReceivedTrajectory, TrajectoryReader, check_finished
from palimpsest.services.learner.old_logprobs.score_store import old_logprobs_record
from tests.builders import SAMPLING, a_finished, a_segment
from tests.interrupted import a_flush
from tests.simulation.memory_bus import MemoryBus, Store

NEWEST = Version(5)


@pytest.fixture
def bus(tmp_path: Path) -> Iterator[SqliteBus]:
    bus = SqliteBus(tmp_path / "bus.sqlite")
    bus.create_topics(dict.fromkeys(TOPICS, 2))
    yield bus
    bus.close()


def an_intake(
    bus: Bus, samples: int = 2, *, keep_flushed: bool = False, ended: Callable[[str], None] = lambda _: None
) -> tuple[TrajectoryReader, TrajectoryLedger[ReceivedTrajectory]]:
    planner: TrajectoryLedger[ReceivedTrajectory] = TrajectoryLedger(
        samples=samples, groups_per_batch=2, max_staleness=1, time_limit_s=60
    )
    intake = TrajectoryReader(
        bus,
        planner,
        run="test",
        seed=0,
        environments={"lookup": 1.0},
        samples=samples,
        sampling=SAMPLING,
        time_limit_s=60,
        confirm=lambda: None,
        keep_flushed=keep_flushed,
        on_resolved=ended,
    )
    return intake, planner


def started(
    bus: SqliteBus, *, keep_flushed: bool = False, ended: Callable[[str], None] = lambda _: None
) -> tuple[TrajectoryReader, TrajectoryLedger[ReceivedTrajectory]]:
    intake, planner = an_intake(bus, keep_flushed=keep_flushed, ended=ended)
    intake.start({}, {}, now=0.0)
    assert intake.offer(Version(0), now=0.0) == 4
    return intake, planner


def publish(bus: SqliteBus, *records: TrajectoryFinished | TrajectoryDropped | SegmentFlushed) -> None:
    bus.publish(TRAJECTORIES, [Outgoing(r.group, encode(r), {"trajectory": r.trajectory}) for r in records])


def letters(bus: SqliteBus) -> list[DeadLetter]:
    with bus.consumer(DEAD_LETTERS) as consumer:
        return [decode(DEAD_LETTERS, r.body) for r in consumer.poll(limit=99, timeout_s=0)]


def test_offers_stand_on_the_log_with_task_and_version(bus: SqliteBus) -> None:
    started(bus)
    with bus.consumer(TASKS) as consumer:
        offers: list[GroupOffered] = [decode(TASKS, r.body) for r in consumer.poll(limit=99, timeout_s=0)]
    assert sorted(offer.index for offer in offers) == [0, 1, 2, 3]
    assert len({offer.task_seed for offer in offers}) == 4
    assert {(o.run, o.environment, o.samples, o.version) for o in offers} == {("test", "lookup", 2, 0)}


def test_finished_and_dropped_trajectories_reach_the_ledger(bus: SqliteBus) -> None:
    intake, planner = started(bus)
    publish(
        bus,
        a_finished(0, 0),
        a_finished(0, 1),
        TrajectoryDropped("test", "g000001/0", "g000001", "worker-0", DropReason.ENVIRONMENT_FAILED, "?"),
    )
    intake.read_all(NEWEST, timeout_s=0)
    assert planner.complete() == 1
    assert planner.counts()["dropped"] == {"environment_failed": 1}
    assert sorted(intake.arrived) == ["g000000/0", "g000000/1"]
    assert intake.sampled_tokens == 8


def test_a_trajectory_that_comes_again_counts_once(bus: SqliteBus) -> None:
    intake, planner = started(bus)
    publish(bus, a_finished(0, 0, reward=0.25), a_finished(0, 0, reward=0.75), a_finished(0, 0))
    intake.read_all(NEWEST, timeout_s=0)
    assert planner.waiting() == 1
    assert intake.arrived["g000000/0"].record.reward == 0.25
    assert letters(bus) == []


def test_offsets_wait_for_what_is_not_trained_yet(bus: SqliteBus) -> None:
    intake, _ = started(bus)
    publish(bus, a_finished(0, 0), a_finished(0, 1))
    intake.read_all(NEWEST, timeout_s=0)
    partition = intake.arrived["g000000/0"].partition
    assert intake.offsets()[partition] == 0
    intake.resolve(intake.arrived["g000000/1"])
    assert intake.offsets()[partition] == 0
    intake.resolve(intake.arrived["g000000/0"])
    assert intake.offsets()[partition] == 2


def test_a_restart_reads_the_unresolved_again_and_adopts_later_offers(bus: SqliteBus) -> None:
    intake, planner = started(bus)
    publish(bus, a_finished(0, 0), a_finished(0, 1), a_finished(1, 0))
    intake.read_all(NEWEST, timeout_s=0)
    assert planner.take_batch() is None
    state, offsets, task_offsets = planner.state(), intake.offsets(), dict(intake.task_ends)
    planner.expire(now=1e9)  # as if the old process went on and offered more before it died
    assert intake.offer(Version(1), now=0.0) > 0
    offered = planner.counts()["offered"]
    intake.close()

    again, fresh = an_intake(bus)
    fresh.restore(state, now=0.0)
    again.start(offsets, task_offsets, now=0.0)
    again.read_all(NEWEST, timeout_s=0)
    assert sorted(again.arrived) == ["g000000/0", "g000000/1", "g000001/0"]
    assert fresh.counts()["offered"] == offered
    assert fresh.next_index == planner.next_index


def test_a_restart_without_any_checkpoint_adopts_everything_offered(bus: SqliteBus) -> None:
    started(bus)
    again, fresh = an_intake(bus)
    again.start({}, {}, now=0.0)
    assert fresh.counts()["offered"] == 8
    assert again.offer(Version(0), now=0.0) == 0


def test_without_the_checkpoints_offsets_what_waits_on_the_log_would_be_lost(bus: SqliteBus) -> None:
    """A group's commits would be such offsets: they say what was read, not what was trained."""
    before, planner = started(bus)
    publish(bus, a_finished(0, 0), a_finished(0, 1))
    before.read_all(NEWEST, timeout_s=0)
    read = {partition: end for partition, end in before._reader.ends().items() if end}
    for offsets, found in ((before.offsets(), 2), (read, 0)):
        intake, again = an_intake(bus)
        again.restore(planner.state(), now=0.0)
        intake.start(offsets, before.task_ends, now=0.0)
        intake.read_all(NEWEST, timeout_s=0)
        assert again.waiting() == found
        intake.close()


class Forgetful(TrajectoryLedger[ReceivedTrajectory]):
    """Does not know ids again."""

    def _known(self, group: str, trajectory: str) -> ArrivalStatus:
        known = super()._known(group, trajectory)
        return ArrivalStatus.NEW if known is ArrivalStatus.DUPLICATE and group in self._open else known


@pytest.mark.parametrize(("kind", "reward"), [(TrajectoryLedger, 0.25), (Forgetful, 0.75)])
def test_without_ids_a_record_that_comes_again_would_take_the_place_of_the_first(
    bus: SqliteBus, kind: type[TrajectoryLedger[ReceivedTrajectory]], reward: float
) -> None:
    intake, _ = an_intake(bus)
    intake._planner = kind(samples=2, groups_per_batch=2, max_staleness=1, time_limit_s=60)
    intake.start({}, {}, now=0.0)
    intake.offer(Version(0), now=0.0)
    publish(bus, a_finished(0, 0, reward=0.25), a_finished(0, 0, reward=0.75))
    intake.read_all(NEWEST, timeout_s=0)
    assert intake.arrived["g000000/0"].record.reward == reward


def test_a_log_that_was_cut_stops_the_run(bus: SqliteBus) -> None:
    intake, _ = an_intake(bus)
    with pytest.raises(UserError, match="Trajectories would be lost silently"):
        intake.start({0: 17}, {}, now=0.0)


def score(bus: Bus, trajectory: str) -> Position:
    """Somebody says a trajectory's old log-probs; where they stand."""
    told = old_logprobs_record(
        run="test", trajectory=trajectory, by="replica-0", tokens=pack_int32([1, 2]), start=1, stop=2,
        version=Version(0), digest="d", values=np.array([-1.0], dtype=np.float32),
    )  # fmt: skip
    (at,) = bus.publish(OLD_LOGPROBS, [Outgoing(trajectory, encode(told))])
    return at


def test_scores_of_what_is_settled_need_not_be_read_again(bus: SqliteBus) -> None:
    """A batch holds two groups, two batches are open: each offer begins where the topic stood."""
    intake, planner = started(bus)
    assert intake.score_offsets() == {0: 0, 1: 0}
    for group in (0, 1):
        publish(bus, a_finished(group, 0), a_finished(group, 1))
        score(bus, f"g{group:06d}/0")
    ends = intake._scores.ends()
    assert sum(ends.values()) == 2
    intake.read_all(NEWEST, timeout_s=0)
    assert planner.take_batch() is not None
    assert intake.offer(Version(1), now=0.0) == 2
    assert intake.score_offsets() == {0: 0, 1: 0}, "groups 2 and 3 were offered before anything was scored"
    planner.expire(now=61.0)  # groups 2 and 3 come to nothing
    assert planner.oldest_open() is None
    score(bus, "g000004/0")
    assert intake.score_offsets() == ends


def test_every_score_of_what_is_pending_stands_where_a_restart_begins_to_read(bus: SqliteBus) -> None:
    """Whatever comes, ends and is scored in whatever order, over several restarts."""
    luck = random.Random(3)
    intake, planner = started(bus)
    places: dict[str, list[Position]] = {}
    least = 0
    for _ in range(400):
        names = [f"g{index:06d}/{sample}" for index in range(planner.next_index) for sample in (0, 1)]
        awaited = [name for name in names[-40:] if intake.pending()(name)]
        match luck.choice(("score", "score", "end", "end", "offer", "restart")):
            case "score":  # late scores of settled ones come too
                name = luck.choice(names[-12:])
                places.setdefault(name, []).append(score(bus, name))
            case "end" if awaited:
                name = luck.choice(awaited)
                planner.drop(name.partition("/")[0], name, DropReason.DEADLINE)
            case "offer":
                intake.offer(Version(0), now=0.0)
            case "restart":
                state, kept = planner.state(), intake.score_offsets()
                if luck.random() < 0.5:  # something is offered after the checkpoint
                    intake.offer(Version(0), now=0.0)
                tasks = dict(intake.task_ends)
                intake.close()
                intake, planner = an_intake(bus)
                planner.restore(state, now=0.0)
                intake.start({}, tasks, kept, now=0.0)
        begin = intake.score_offsets()
        for name, positions in places.items():
            if intake.pending()(name):
                assert all(at.offset >= begin.get(at.partition, 0) for at in positions)
        assert sum(begin.values()) >= least, "it does not go back"
        least = sum(begin.values())
    assert planner.next_index > 30
    assert least > 0.8 * sum(map(len, places.values())), "nearly all that was said is passed over"
    intake.close()


def test_a_log_of_scores_that_was_cut_stops_the_run_unless_nothing_there_is_wanted() -> None:
    bus = MemoryBus(Store())
    bus.create_topics(dict.fromkeys(TOPICS, 1))
    for _ in range(9):
        score(bus, "g000000/0")
    bus.store.cut(OLD_LOGPROBS, 0, before=5)
    for wanted in ({}, {0: 5}, {0: 9}):  # {}: a checkpoint that does not say
        intake, _ = an_intake(bus)
        intake.start({}, {}, wanted, now=0.0)
        assert intake.score_offsets() == wanted
    for lost in ({0: 4}, {0: 10}, {1: 0}):
        intake, _ = an_intake(bus)
        with pytest.raises(UserError, match=rf"what the checkpoint needs: .*{OLD_LOGPROBS}") as told:
            intake.start({}, {}, lost, now=0.0)
        assert told.value.code is ExitCode.DAMAGED


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
    """Records buried for this cause, as Prometheus is told."""
    return instruments.DEAD_LETTERS.labels(cause.value, TRAJECTORIES)._value.get()


@pytest.mark.parametrize("what", BROKEN)
def test_poison_is_dead_lettered_with_its_cause_and_the_run_goes_on(bus: SqliteBus, what: str) -> None:
    intake, planner = started(bus)
    cause, changes = BROKEN[what]
    broken, before = msgspec.structs.replace(finished, **changes), counted(cause)
    with pytest.raises(Malformed):
        check_finished(broken, NEWEST)
    publish(bus, broken, a_finished(0, 1))
    intake.read_all(NEWEST, timeout_s=0)
    (letter,) = letters(bus)
    assert (letter.cause, letter.topic, letter.key, letter.body) == (cause, TRAJECTORIES, "g000000", encode(broken))
    assert letter.headers == {"trajectory": "g000000/0"}
    assert letter.reason
    assert letter.buried_at > 0
    assert counted(cause) == before + 1
    assert planner.counts()["dead_lettered"] == 1
    assert planner.counts()["pending"] == 7
    assert list(intake.arrived) == ["g000000/1"]


def test_a_record_of_another_release_is_buried_as_such(bus: SqliteBus) -> None:
    intake, _ = started(bus)
    newer = msgspec.msgpack.encode({"type": "trajectory_finished/2", "run": "test"})
    bus.publish(TRAJECTORIES, [Outgoing("g000000", newer, {"trajectory": "g000000/0"})])
    intake.read_all(NEWEST, timeout_s=0)
    (letter,) = letters(bus)
    assert letter.cause is RejectCause.UNKNOWN_SCHEMA
    assert "trajectory_finished/2" in letter.reason


def test_a_record_whose_body_is_lost_is_buried_with_its_claim(bus: SqliteBus) -> None:
    intake, planner = started(bus)
    headers = {"trajectory": "g000000/0", "claim": "c3" * 32, "claim_lost": "the body c3c3 is not in the store"}
    bus.publish(TRAJECTORIES, [Outgoing("g000000", b"", headers)])
    intake.read_all(NEWEST, timeout_s=0)
    (letter,) = letters(bus)
    assert (letter.cause, letter.headers) == (RejectCause.MISSING_CLAIM, headers)
    assert "the body c3c3 is not in the store" in letter.reason
    assert planner.counts()["dead_lettered"] == 1


def test_garbage_that_names_a_trajectory_cannot_take_its_place(bus: SqliteBus) -> None:
    intake, planner = started(bus)
    bus.publish(TRAJECTORIES, [Outgoing("g000000", b"garbage", {"trajectory": "g000000/1"})])
    publish(bus, a_finished(0, 0))
    intake.read_all(NEWEST, timeout_s=0)
    assert (planner.counts()["dead_lettered"], planner.complete()) == (1, 1)
    publish(bus, a_finished(0, 1))
    intake.read_all(NEWEST, timeout_s=0)
    assert planner.counts() == {"offered": 8, "trained": 0, "dropped": {}, "dead_lettered": 0, "pending": 8}
    assert sorted(intake.arrived) == ["g000000/0", "g000000/1"]
    assert intake.offsets()[intake.arrived["g000000/0"].partition] == 1, "both wait to be trained on"
    assert len(letters(bus)) == 1


def test_a_sound_record_that_comes_after_its_group_is_a_duplicate(
    bus: SqliteBus, capsys: pytest.CaptureFixture[str]
) -> None:
    logs.configure("learner", "info", "json")
    intake, planner = started(bus)
    bus.publish(TRAJECTORIES, [Outgoing("g000000", b"garbage", {"trajectory": f"g000000/{s}"}) for s in range(2)])
    intake.read_all(NEWEST, timeout_s=0)
    before, duplicates = planner.counts(), instruments.DUPLICATES._value.get()
    publish(bus, a_finished(0, 1))
    intake.read_all(NEWEST, timeout_s=0)
    assert planner.counts() == before
    assert planner.counts()["dead_lettered"] == 2
    assert instruments.DUPLICATES._value.get() == duplicates + 1
    assert '"group": "closed", "event": "duplicate"' in capsys.readouterr().err
    assert intake.offsets() == intake._reader.ends()


def test_undecodable_bytes_are_kept_whole_and_attributed_by_their_header(bus: SqliteBus) -> None:
    intake, planner = started(bus)
    bus.publish(TRAJECTORIES, [Outgoing("g000002", b"\x00garbage", {"trajectory": "g000002/1"})])
    bus.publish(TRAJECTORIES, [Outgoing("?", b"\xff\xfe")])
    intake.read_all(NEWEST, timeout_s=0)
    assert len(letters(bus)) == 2
    assert planner.counts()["dead_lettered"] == 1
    with bus.consumer(DEAD_LETTERS) as consumer:
        bodies = {decode(DEAD_LETTERS, r.body).body for r in consumer.poll(limit=9, timeout_s=0)}
    assert bodies == {b"\x00garbage", b"\xff\xfe"}


def test_sound_records_that_belong_elsewhere_take_nothing_from_this_run(bus: SqliteBus) -> None:
    intake, planner = started(bus)
    publish(bus, a_finished(0, 0, run="another"), a_finished(77, 0), a_finished(0, 9))
    intake.read_all(NEWEST, timeout_s=0)
    assert Counter(letter.cause for letter in letters(bus)) == {RejectCause.WRONG_RUN: 1, RejectCause.NEVER_OFFERED: 2}
    assert planner.counts() == {"offered": 8, "trained": 0, "dropped": {}, "dead_lettered": 0, "pending": 8}
    assert intake.offsets() == intake._reader.ends()


def test_every_record_moves_the_frontier(bus: SqliteBus) -> None:
    """Nothing unusable may be read again for ever."""
    intake, _ = started(bus)
    bus.publish(TRAJECTORIES, [Outgoing(f"k{i}", b"junk") for i in range(20)])
    publish(bus, a_finished(77, 0), a_finished(0, 0), a_finished(0, 0))
    intake.read_all(NEWEST, timeout_s=0)
    intake.resolve(intake.arrived["g000000/0"])
    with bus.consumer(TRAJECTORIES) as consumer:
        assert intake.offsets() == consumer.ends()


def flushed(intake: TrajectoryReader) -> list[tuple[str, int]]:
    """Flushes in hand: trajectory and offset."""
    return [(one.record.trajectory, one.offset) for one in intake.flushed]


def test_flushes_are_kept_with_their_place_until_they_are_resolved_and_the_ledger_stays_as_it_is(
    bus: SqliteBus,
) -> None:
    intake, planner = started(bus, keep_flushed=True)
    before = planner.counts()
    publish(bus, a_flush(0, 0), a_flush(0, 1))
    intake.read_all(NEWEST, timeout_s=0)
    assert flushed(intake) == [("g000000/0", 0), ("g000000/1", 1)]
    assert planner.counts() == before
    partition = next(iter(intake.flushed)).partition
    for offset, one in enumerate(list(intake.flushed)):
        assert intake.offsets()[partition] == offset
        intake.resolve_flushed(one)
    assert intake.offsets() == intake._reader.ends()
    assert flushed(intake) == []


def test_a_restart_reads_flushes_again_that_were_not_resolved(bus: SqliteBus) -> None:
    intake, planner = started(bus, keep_flushed=True)
    publish(bus, a_flush(0, 0), a_flush(0, 1))
    intake.read_all(NEWEST, timeout_s=0)
    intake.resolve_flushed(next(iter(intake.flushed)))
    again, fresh = an_intake(bus, keep_flushed=True)
    fresh.restore(planner.state(), now=0.0)
    again.start(intake.offsets(), intake.task_ends, now=0.0)
    again.read_all(NEWEST, timeout_s=0)
    assert flushed(again) == [("g000000/1", 1)]


def test_where_nobody_scores_flushes_they_hold_nothing_up(bus: SqliteBus) -> None:
    intake, _ = started(bus)
    publish(bus, a_flush(0, 0))
    intake.read_all(NEWEST, timeout_s=0)
    assert flushed(intake) == []
    assert intake.offsets() == intake._reader.ends()


def test_a_later_flush_takes_the_place_of_the_former_one(bus: SqliteBus) -> None:
    intake, _ = started(bus, keep_flushed=True)
    publish(bus, a_flush(0, 0, tokens=6), a_flush(0, 0, tokens=9, segments=(a_segment(2, 6, 0), a_segment(6, 9, 1))))
    intake.read_all(NEWEST, timeout_s=0)
    assert flushed(intake) == [("g000000/0", 1)]
    assert intake.offsets()[next(iter(intake.flushed)).partition] == 1


@pytest.mark.parametrize("finished_first", [False, True])
def test_a_trajectorys_end_holds_its_flushes_in_either_order(bus: SqliteBus, finished_first: bool) -> None:
    intake, _ = started(bus, keep_flushed=True)
    records = [a_flush(0, 0), a_flush(0, 0, tokens=[9, 9, 9, 9, 9, 9]), a_finished(0, 0)]
    publish(bus, *(records[::-1] if finished_first else records))
    intake.read_all(NEWEST, timeout_s=0)
    assert flushed(intake) == []
    (arrived,) = intake.arrived.values()
    assert intake.offsets()[arrived.partition] == (0 if finished_first else 2)
    intake.resolve(arrived)
    assert intake.offsets() == intake._reader.ends()


def test_a_dropped_or_resolved_trajectory_forgets_its_flushes_and_says_so(bus: SqliteBus) -> None:
    ended: list[str] = []
    intake, planner = started(bus, keep_flushed=True, ended=ended.append)
    publish(bus, a_flush(0, 0), a_flush(0, 1), a_flush(1, 0), a_finished(1, 1))
    intake.read_all(NEWEST, timeout_s=0)
    assert (len(intake.flushed), ended) == (3, [])
    publish(bus, TrajectoryDropped("test", "g000000/0", "g000000", "a", DropReason.ENGINE_FAILED, "?"), a_flush(0, 0))
    intake.read_all(NEWEST, timeout_s=0)
    assert [name for name, _ in flushed(intake)] == ["g000000/1", "g000001/0"]
    for trajectory in planner.expire(now=1e9)[:2]:
        intake.forget(trajectory)
    publish(bus, a_flush(0, 1), a_flush(1, 0))  # whose worker has not heard of it
    intake.read_all(NEWEST, timeout_s=0)
    intake.resolve(intake.arrived["g000001/1"])
    assert flushed(intake) == []
    assert ended == ["g000000/0", "g000000/1", "g000001/0", "g000001/1"]
    assert intake.offsets() == intake._reader.ends()


def test_pending_is_what_is_awaited_or_waits_to_be_trained_on(bus: SqliteBus) -> None:
    intake, _ = started(bus)
    publish(bus, a_finished(0, 0), TrajectoryDropped("test", "g000000/1", "g000000", "a", DropReason.DEADLINE, "?"))
    intake.read_all(NEWEST, timeout_s=0)
    pending = intake.pending()
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
def test_a_broken_flush_is_buried_and_its_trajectory_lives_on(bus: SqliteBus, what: str) -> None:
    intake, planner = started(bus, keep_flushed=True)
    before, (cause, broken) = planner.counts(), BROKEN_FLUSHES[what]
    publish(bus, broken)
    intake.read_all(NEWEST, timeout_s=0)
    (letter,) = letters(bus)
    assert (letter.cause, letter.body) == (cause, encode(broken))
    assert (flushed(intake), planner.counts()) == ([], before)
    assert intake.offsets() == intake._reader.ends()
    publish(bus, a_finished(0, 0))
    intake.read_all(NEWEST, timeout_s=0)
    assert list(intake.arrived) == ["g000000/0"]


def test_everything_up_to_the_positions_is_taken_in(bus: SqliteBus) -> None:
    intake, _ = started(bus, keep_flushed=True)
    publish(bus, *(a_flush(group, sample) for group in range(4) for sample in range(2)))
    with bus.consumer(TRAJECTORIES) as consumer:
        ends = consumer.ends()
    assert intake.read_until(ends, NEWEST, deadline_s=10)
    assert len(intake.flushed) == 8
    assert intake.read_until({}, NEWEST, deadline_s=0)
    assert intake.read_until(ends, NEWEST, deadline_s=0), "what was read need not come again"
    assert intake.read_until({0: 10**9, 99: 1}, NEWEST, deadline_s=0), (
        "nobody can have published more than stands there"
    )


def test_positions_that_do_not_come_in_time_are_said(bus: SqliteBus, monkeypatch: pytest.MonkeyPatch) -> None:
    intake, _ = started(bus, keep_flushed=True)
    publish(bus, a_flush(0, 0))
    with bus.consumer(TRAJECTORIES) as consumer:
        ends = consumer.ends()
    monkeypatch.setattr(intake._reader, "poll", lambda **_: [])  # an outage
    assert not intake.read_until(ends, NEWEST, deadline_s=0.01)
