"""The learner's side of a cut, on a real log: who is waited for, what is scored, what is left when it is over."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import msgspec
import pytest
import torch

from palimpsest.common.arrays import Float32Array, pack_int32
from palimpsest.common.bus.port import Outgoing, Record
from palimpsest.common.bus.sqlite import SqliteConsumer
from palimpsest.common.messages import (
    CONTROL,
    DEAD_LETTERS,
    OLD_LOGPROBS,
    TRAJECTORIES,
    WORKERS,
    CutReleased,
    CutRequested,
    SegmentFlushed,
    encode,
)
from palimpsest.common.rejected_record import RejectCause
from palimpsest.common.snapshots.fencing import Fenced
from palimpsest.common.versions import Version
from palimpsest.services.learner import instruments
from palimpsest.services.learner.batch.batching import PaddedBatch
from palimpsest.services.learner.distributed import ProcessGroup
from palimpsest.services.learner.old_logprobs.distributed_scorer import DistributedScorer, model_scorer
from palimpsest.services.learner.old_logprobs.eager_scorer import as_row
from palimpsest.services.learner.old_logprobs.interruption.liveness import ALIVE_S
from palimpsest.services.learner.old_logprobs.interruption.outage_clock import MOST_LOST_S
from tests.learner_parts.interruption import (
    RUN,
    Learner,
    Log,
    Table,
    Ticking,
    a_flush,
    alive,
    digest,
    flushing,
    reached,
)
from tests.learner_parts.models import CPU, load
from tests.records.builders import a_finished, a_segment

V0, V1 = Version(0), Version(1)


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Log]:
    log = Log(tmp_path)
    log.announced(0)
    yield log
    log.close()


def requests(log: Log) -> list[CutRequested]:
    return [m for m in log.messages(CONTROL) if isinstance(m, CutRequested)]


def known(learner: Learner, record: SegmentFlushed, version: int = 0) -> list[float]:
    """The values that the record's tokens have, nan where none."""
    row = learner.scores.attach(as_row(record), {Version(version): digest(version)})
    assert row.old is not None
    return [float(value) for value in row.old]


def test_finished_and_live_trajectories_are_scored_and_durable_when_a_cut_is_over(log: Log) -> None:
    log.said(alive("a"), alive("b"))
    learner = Learner(log, Table(0))
    log.sampled(a_finished(0, 0), a_finished(0, 1, segments=(a_segment(3, 7, 0),)))
    log.answers = [flushing("a", a_flush(1, 0), a_flush(1, 1)), flushing("b", a_flush(2, 0, worker="b"))]
    report = learner.interruption.cut(V0, digest(0))
    assert (report.cut, report.version) == (1, 0)
    assert (report.workers, report.answered, report.late) == (("a", "b"), ("a", "b"), ())
    assert (report.tokens_scored, report.flushed, report.caught_up, report.fenced) == (20, 3, True, False)
    assert report.stall_s > 0
    assert set(report.seconds) == {"before", "wait", "read", "score"}
    assert [request.deadline_s for request in requests(log)] == [5.0]
    assert sorted(record.trajectory for record in log.scored()) == sorted(
        ["g000000/0", "g000000/1", "g000001/0", "g000001/1", "g000002/0"]
    )
    last = known(learner, a_flush(2, 0))
    assert last[2:6] == pytest.approx(Table(0).value([3, 4, 5, 6]).tolist())


def test_the_request_comes_first_and_the_scores_stand_before_it_returns(log: Log) -> None:
    log.said(alive("a"))
    learner = Learner(log, Table(0))
    log.order.clear()
    log.answers = [flushing("a", a_flush(1, 0))]
    learner.interruption.cut(V0, digest(0))
    assert log.order == [CONTROL, TRAJECTORIES, WORKERS, OLD_LOGPROBS]


def test_flushes_are_resolved_once_scored_and_trajectories_wait_on(log: Log) -> None:
    log.said(alive("a"))
    learner = Learner(log, Table(0))
    log.answers = [flushing("a", a_flush(1, 0), a_flush(2, 0))]
    learner.interruption.cut(V0, digest(0))
    assert len(learner.reader.flushed) == 0
    assert learner.reader.offsets() == learner.reader._consumer.ends()
    assert learner.ledger.counts()["pending"] == 8, "a flush changes nothing in the ledger"


def test_a_worker_that_dies_before_it_answers_is_left_out_at_the_deadline(log: Log) -> None:
    log.said(alive("a"), alive("dead"))
    learner = Learner(log, Table(0), clock=Ticking(0.2))
    log.answers = [flushing("a", a_flush(1, 0))]
    before = instruments.LATE_WORKERS._value.get()
    report = learner.interruption.cut(V0, digest(0))
    assert (report.answered, report.late) == (("a",), ("dead",))
    assert report.tokens_scored == 4, "what the others flushed is scored all the same"
    assert 5.0 <= report.stall_s < ALIVE_S
    assert instruments.LATE_WORKERS._value.get() == before + 1


def test_nobody_waits_longer_for_a_silent_worker_than_the_roster_does(log: Log) -> None:
    log.said(alive("dead"))
    learner = Learner(log, Table(0), clock=Ticking(0.5), deadline_s=1e9)
    report = learner.interruption.cut(V0, digest(0))
    assert report.late == ("dead",)
    assert report.stall_s < 2 * ALIVE_S
    assert learner.interruption.cut(V0, digest(0)).workers == (), "unheard of since, it is no longer asked"


def test_without_workers_a_cut_scores_what_there_is(log: Log) -> None:
    learner = Learner(log, Table(0))
    log.sampled(a_finished(0, 0))
    learner.read()
    report = learner.interruption.cut(V0, digest(0))
    assert (report.workers, report.tokens_scored) == ((), 4)


def test_a_worker_that_comes_while_the_cut_is_open_is_waited_for(log: Log) -> None:
    log.said(alive("a"))
    learner = Learner(log, Table(0))

    def late_comer(log: Log, request: CutRequested) -> None:
        log.said(alive("new"))
        log.said(reached("new", request.cut, log.sampled(a_flush(3, 0, worker="new"))))

    log.answers = [flushing("a", a_flush(1, 0)), late_comer]
    report = learner.interruption.cut(V0, digest(0))
    assert report.answered == ("a", "new")
    assert report.tokens_scored == 8


def test_answers_to_a_former_cut_count_for_nothing(log: Log) -> None:
    log.said(alive("a"))
    learner = Learner(log, Table(0), clock=Ticking(0.2))
    assert learner.interruption.cut(V0, digest(0)).late == ("a",)
    before = instruments.LATE_ANSWERS._value.get()
    log.answers = [lambda log, request: log.said(reached("a", request.cut - 1, {0: 10**9}))]
    report = learner.interruption.cut(V0, digest(0))
    assert (report.cut, report.answered, report.late) == (2, (), ("a",))
    assert instruments.LATE_ANSWERS._value.get() == before + 1


def test_a_worker_that_answers_too_late_loses_what_it_flushed_and_nothing_else(log: Log) -> None:
    """Its tokens belong to weights that are gone: they are never scored with others."""
    table = Table(0)
    log.said(alive("a"))
    learner = Learner(log, table, clock=Ticking(0.2))
    assert learner.interruption.cut(V0, digest(0)).late == ("a",)
    table.version = 1
    log.announced(1)
    learner.interruption.published(V1, digest(1))
    late, fresh = a_flush(1, 0), a_flush(1, 0, cut=2, tokens=12, segments=(a_segment(2, 6, 0), a_segment(8, 12, 1)))
    log.said(reached("a", 1, log.sampled(late)))
    before = instruments.LATE_TOKENS._value.get(), instruments.FLUSHES.labels("late")._value.get()
    learner.read(1)
    assert learner.interruption.work(V1, digest(1)) == 0
    assert log.scored() == []
    assert (instruments.LATE_TOKENS._value.get(), instruments.FLUSHES.labels("late")._value.get()) == (
        before[0] + 4,
        before[1] + 1,
    )
    assert learner.reader.offsets() == learner.reader._consumer.ends()
    log.answers = [flushing("a", fresh)]
    report = learner.interruption.cut(V1, digest(1))
    assert (report.answered, report.tokens_scored) == (("a",), 4)
    assert instruments.LATE_TOKENS._value.get() == before[0] + 4, "its next flush holds them again: counted once"
    assert [(r.version, r.start, r.stop) for r in log.scored()] == [(1, 8, 12)]


def test_what_arrives_while_a_batch_is_waited_for_is_scored_then_and_not_at_the_cut(log: Log) -> None:
    log.said(alive("a"))
    learner = Learner(log, Table(0))
    log.sampled(a_finished(0, 0), a_finished(0, 1))
    learner.read()
    assert learner.interruption.work(V0, digest(0)) == 8
    assert learner.interruption.work(V0, digest(0)) == 0
    log.answers = [flushing("a")]
    assert learner.interruption.cut(V0, digest(0)).tokens_scored == 0


def test_a_call_while_waiting_is_bounded(log: Log) -> None:
    learner = Learner(log, Table(0), clock=Ticking(1.0), micro_batch_tokens=8)
    log.sampled(*(a_finished(group, sample) for group in range(4) for sample in range(2)))
    learner.read()
    assert learner.interruption.work(V0, digest(0)) == 4, "one micro-batch took longer than a slice may"
    assert sum(iter(lambda: learner.interruption.work(V0, digest(0)), 0)) == 28


def test_what_is_being_trained_on_need_not_be_scored_for_anybody(log: Log) -> None:
    learner = Learner(log, Table(0))
    log.sampled(a_finished(0, 0), a_finished(0, 1), a_finished(1, 0))
    learner.read()
    report = learner.interruption.cut(V0, digest(0), training={"g000000/0", "g000000/1"})
    assert report.tokens_scored == 4
    assert [record.trajectory for record in log.scored()] == ["g000001/0"]


def test_a_trajectory_that_was_flushed_and_then_finishes_is_scored_once(log: Log) -> None:
    """Within one cut: the end holds everything. In a later one: only what came since."""
    log.said(alive("a"))
    learner = Learner(log, Table(0))
    end = a_finished(1, 0, tokens=10, segments=(a_segment(2, 6, 0), a_segment(8, 10, 0)))
    log.answers = [flushing("a", a_flush(1, 0, tokens=6), a_flush(1, 1, tokens=6), end)]
    assert learner.interruption.cut(V0, digest(0)).tokens_scored == 6 + 4
    log.sampled(a_finished(1, 1, tokens=10, segments=(a_segment(2, 6, 0), a_segment(8, 10, 0))))
    log.answers = [flushing("a")]
    assert learner.interruption.cut(V0, digest(0)).tokens_scored == 2
    spans = sorted((r.trajectory, r.start, r.stop) for r in log.scored())
    assert spans == [("g000001/0", 2, 6), ("g000001/0", 8, 10), ("g000001/1", 2, 6), ("g000001/1", 8, 10)]
    assert learner.scores.repeats == learner.scores.conflicts == 0


def test_the_same_id_sampled_twice_keeps_each_sampling_to_itself(log: Log) -> None:
    log.said(alive("a"), alive("b"))
    learner = Learner(log, Table(0))
    first, second = a_flush(1, 0, tokens=[5, 6, 7, 8, 9, 10]), a_flush(1, 0, tokens=[5, 6, 70, 80, 90, 100], worker="b")
    log.answers = [flushing("a", first), flushing("b", second)]
    assert learner.interruption.cut(V0, digest(0)).tokens_scored == 8
    assert known(learner, first)[2:] == pytest.approx(Table(0).value([7, 8, 9, 10]).tolist())
    assert known(learner, second)[2:] == pytest.approx(Table(0).value([70, 80, 90, 100]).tolist())
    log.sampled(msgspec.structs.replace(a_finished(1, 0), tokens=pack_int32([5] * 6)))
    learner.read()
    log.answers = [flushing("a"), flushing("b")]
    assert learner.interruption.cut(V0, digest(0)).tokens_scored == 4, "neither flush speaks of these tokens"


def test_a_dropped_trajectory_leaves_neither_flush_nor_scores(log: Log) -> None:
    learner = Learner(log, Table(0))
    log.sampled(a_flush(1, 0))
    learner.read()
    learner.interruption.work(V0, digest(0))
    assert len(learner.scores) == 1
    log.sampled(a_flush(1, 0, tokens=9, segments=(a_segment(2, 9, 0),)))
    learner.read()
    learner.reader.forget("g000001/0")
    assert (len(learner.reader.flushed), len(learner.scores)) == (0, 0)


def test_restarted_between_scoring_and_step_it_finds_every_value_bit_for_bit(starting_model: Path, log: Log) -> None:
    """Nothing is scored twice: the same cut again costs the workers' flushes only."""
    model = load(starting_model)
    log.said(alive("a"))
    before = Learner(log, DistributedScorer(ProcessGroup(), model_scorer(model, CPU)))
    log.sampled(a_finished(0, 0), a_finished(0, 1, tokens=12, segments=(a_segment(2, 11, 0),)))
    flushes = [a_flush(1, 0), a_flush(1, 1, tokens=20, segments=(a_segment(4, 20, 0),))]
    log.answers = [flushing("a", *flushes)]
    first = before.interruption.cut(V0, digest(0))
    assert first.tokens_scored == 4 + 9 + 4 + 16
    before.close()

    count, asked = len(log.scored()), torch.get_rng_state()
    after = Learner(log, DistributedScorer(ProcessGroup(), model_scorer(model, CPU)), before=before)
    log.announced(0)
    after.read()
    assert after.interruption.work(V0, digest(0)) == 0
    second = after.interruption.cut(V0, digest(0))
    assert (second.cut, second.tokens_scored, second.flushed) == (2, 0, 2)
    assert len(log.scored()) == count
    assert torch.equal(torch.get_rng_state(), asked)
    for record in [*flushes, *(arrived.record for arrived in after.reader.arrived.values())]:
        there, here = known(before, record), known(after, record)  # type: ignore[arg-type]
        assert [v for v in here if v == v]
        assert torch.equal(torch.tensor(there).nan_to_num(9.0), torch.tensor(here).nan_to_num(9.0))


def test_a_restart_without_the_former_values_would_score_them_again(log: Log) -> None:
    """The counter-test: it is the log that spares the work."""
    learner = Learner(log, Table(0))
    log.sampled(a_finished(0, 0))
    learner.read()
    assert learner.interruption.cut(V0, digest(0)).tokens_scored == 4
    learner.scores.forget("g000000/0")
    learner.scorer._done.clear()
    assert learner.interruption.cut(V0, digest(0)).tokens_scored == 4


def test_a_restart_passes_over_scores_of_what_is_resolved(log: Log) -> None:
    before = Learner(log, Table(0))
    log.sampled(a_finished(0, 0), a_finished(0, 1), a_finished(1, 0))
    before.read()
    before.interruption.cut(V0, digest(0))
    resolved = [arrived for name, arrived in before.reader.arrived.items() if name.startswith("g000000")]
    state = before.ledger.state()
    del state.open_groups["g000000"]  # as if it had been trained on
    before.ledger.restore(state, now=0.0)
    for arrived in resolved:
        before.reader.resolve(arrived)
    assert len(before.scores) == 1
    after = Learner(log, Table(0), before=before)
    assert len(after.scores) == 1
    assert after.scores.digests == {V0: digest(0)}


def test_garbage_among_the_scores_is_kept_and_does_not_stop_a_restart(log: Log) -> None:
    before = Learner(log, Table(0))
    log.sampled(a_finished(0, 0))
    before.read()
    before.interruption.cut(V0, digest(0))
    (sound,) = log.scored()
    short = msgspec.structs.replace(sound, values=b"1234")
    log.publish(OLD_LOGPROBS, [Outgoing("x", b"garbage"), Outgoing("g000000/0", encode(short))])
    log.publish(WORKERS, [Outgoing("a", b"garbage")])
    after = Learner(log, Table(0), before=before)
    assert len(after.scores) == 1
    causes = sorted((letter.topic, letter.cause) for letter in log.messages(DEAD_LETTERS))
    assert causes == [
        (OLD_LOGPROBS, RejectCause.LENGTH_MISMATCH),
        (OLD_LOGPROBS, RejectCause.UNDECODABLE),
        (WORKERS, RejectCause.UNDECODABLE),
    ]
    assert after.ledger.counts()["dead_lettered"] == 0, "none of them was a trajectory"


def test_workers_of_another_run_are_nobody_here(log: Log) -> None:
    learner = Learner(log, Table(0))
    stranger = alive("a")
    log.said(msgspec.structs.replace(stranger, run="another"))
    assert learner.interruption.cut(V0, digest(0)).workers == ()


def test_a_learner_that_was_replaced_stops_nobody_and_does_not_raise(log: Log) -> None:
    """Other ranks wait in a collective while it asks; the loop hears of it right after."""
    fenced = False

    def confirm() -> None:
        if fenced:
            raise Fenced("another learner took this run over")

    learner = Learner(log, Table(0), confirm=confirm)
    log.sampled(a_finished(0, 0))
    learner.read()
    fenced = True
    report = learner.interruption.cut(V0, digest(0))
    assert report.fenced
    assert requests(log) == []
    learner.interruption.release()
    assert [m for m in log.messages(CONTROL) if isinstance(m, CutReleased)] == []


class OutOfMemory(Exception): ...


def test_a_cut_that_comes_to_nothing_is_released_once(log: Log) -> None:
    def fails(batches: Sequence[PaddedBatch]) -> list[Float32Array]:
        raise OutOfMemory

    log.said(alive("a"))
    learner = Learner(log, fails)
    learner.interruption.release()
    log.answers = [flushing("a", a_flush(1, 0))]
    with pytest.raises(OutOfMemory):
        learner.interruption.cut(V0, digest(0))
    learner.interruption.release()
    learner.interruption.release()
    assert [m for m in log.messages(CONTROL) if isinstance(m, CutReleased)] == [CutReleased(RUN, 1)]


def test_once_a_cut_has_returned_nobody_is_let_sample_with_its_version_again(log: Log) -> None:
    """If the learner ends now, the checkpoint it goes on from may be of the next version."""
    learner = Learner(log, Table(0))
    learner.interruption.cut(V0, digest(0))
    learner.interruption.release()
    assert [m for m in log.messages(CONTROL) if isinstance(m, CutReleased)] == []


class Looked(Protocol):
    """What happens when the learner looks for what workers say for the n-th time since a cut was asked for."""

    def __call__(self, look: int) -> None: ...


class FarLog(Log):
    """A log over a network. A poll that does not wait brings nothing: what there is, is on its way."""

    looked: Looked | None = None
    looks = 0

    def consumer(self, topic: str, *, group: str | None = None, member: str = "") -> SqliteConsumer:
        """See Bus."""
        consumer = super().consumer(topic, group=group, member=member)
        poll, ends = consumer.poll, consumer.ends

        def patient(*, limit: int, timeout_s: float) -> list[Record]:
            return poll(limit=limit, timeout_s=timeout_s) if timeout_s else []

        def answered() -> dict[int, int]:
            if topic == WORKERS and self.looked is not None and requests(self):
                self.looks += 1
                self.looked(self.looks)
            return ends()

        consumer.poll, consumer.ends = patient, answered  # type: ignore[method-assign]
        return consumer


@pytest.fixture
def far(tmp_path: Path) -> Iterator[FarLog]:
    log = FarLog(tmp_path / "far")
    log.announced(0)
    yield log
    log.close()


def test_whoever_has_spoken_is_waited_for_though_a_poll_does_not_bring_it(far: FarLog) -> None:
    learner = Learner(far, Table(0))
    far.said(alive("a"), alive("b"))
    far.answers = [flushing("a", a_flush(1, 0)), flushing("b", a_flush(2, 0, worker="b"))]
    report = learner.interruption.cut(V0, digest(0))
    assert (report.answered, report.late, report.tokens_scored) == (("a", "b"), (), 8)


def test_what_a_worker_that_died_had_finished_is_scored_though_a_poll_does_not_bring_it(far: FarLog) -> None:
    learner = Learner(far, Table(0))
    far.sampled(a_finished(0, 0))
    assert learner.interruption.cut(V0, digest(0)).tokens_scored == 4


@pytest.mark.parametrize("out_s", [60.0, 400.0])
def test_an_outage_of_the_log_takes_no_time_from_the_workers(out_s: float, far: FarLog) -> None:
    """Not even twice; what they sampled by then is scored like anything else."""
    clock = Ticking()
    learner = Learner(far, Table(0), clock=clock)
    far.said(alive("a"), alive("b"))

    def looked(look: int) -> None:
        match look:
            case 1 | 3:
                clock.now += out_s
            case 5:
                flushing("a", a_flush(1, 0))(far, requests(far)[-1])
            case 7:
                flushing("b", a_flush(2, 0, worker="b"))(far, requests(far)[-1])

    far.looked = looked
    report = learner.interruption.cut(V0, digest(0))
    assert (report.answered, report.late, report.tokens_scored) == (("a", "b"), (), 8)


@pytest.mark.thorough
def test_a_log_that_answers_every_now_and_then_does_not_hold_the_learner_for_ever(far: FarLog) -> None:
    clock = Ticking()
    learner = Learner(far, Table(0), clock=clock)
    far.said(alive("dead"))

    def looked(look: int) -> None:
        clock.now += 6.0

    far.looked = looked
    report = learner.interruption.cut(V0, digest(0))
    assert report.late == ("dead",)
    assert MOST_LOST_S < report.stall_s < MOST_LOST_S + 20


def test_after_an_outage_whoever_was_there_before_it_is_waited_for(far: FarLog) -> None:
    """The learner trained meanwhile, and no worker has come through again yet."""
    clock = Ticking()
    learner = Learner(far, Table(0), clock=clock)
    far.said(alive("a"))
    far.answers = [flushing("a")]
    learner.interruption.cut(V0, digest(0))
    clock.now += 60.0
    far.answers = []

    def looked(look: int) -> None:
        if len(requests(far)) == 2 and look == far.looks >= 8:
            flushing("a", a_flush(1, 0))(far, requests(far)[-1])
            far.looked = None

    far.looked = looked
    report = learner.interruption.cut(V0, digest(0))
    assert (report.answered, report.late, report.tokens_scored) == (("a",), (), 4)


@pytest.mark.thorough
def test_a_worker_that_is_gone_for_good_is_waited_for_in_few_cuts(log: Log) -> None:
    log.said(alive("dead"))
    clock = Ticking(0.05)
    learner = Learner(log, Table(0), clock=clock)
    asked = []
    for _ in range(4):
        asked.append(learner.interruption.cut(V0, digest(0)).workers)
        clock.now += 60.0
    assert asked == [("dead",), ("dead",), (), ()]


def test_the_number_of_a_cut_that_another_learner_asked_for_is_not_used_again(log: Log) -> None:
    """It was being replaced; workers would take a second request of that number for a copy."""
    log.said(alive("a"))
    learner = Learner(log, Table(0))
    log.said(reached("a", 1))
    log.answers = [flushing("a", a_flush(1, 0))]
    assert learner.interruption.cut(V0, digest(0)).cut == 2


def test_a_restart_does_not_read_scores_of_what_was_settled_before_its_checkpoint(log: Log) -> None:
    log.publish(OLD_LOGPROBS, [Outgoing("x", b"stands there before anything is offered")])
    before = Learner(log, Table(0))
    log.sampled(a_finished(0, 0))
    before.read()
    before.interruption.cut(V0, digest(0))
    count = len(log.messages(DEAD_LETTERS))
    after = Learner(log, Table(0), before=before)
    assert len(after.scores) == 1
    assert len(log.messages(DEAD_LETTERS)) == count, "it was not met again"


def test_cuts_go_on_counting_over_restarts(log: Log) -> None:
    first = Learner(log, Table(0))
    assert [first.interruption.cut(V0, digest(0)).cut for _ in range(2)] == [1, 2]
    assert Learner(log, Table(0), before=first).interruption.cut(V0, digest(0)).cut == 3
    assert [request.cut for request in requests(log)] == [1, 2, 3]


def test_positions_that_nobody_can_have_reached_do_not_hold_the_learner_up(log: Log) -> None:
    log.said(alive("a"))
    learner = Learner(log, Table(0))
    log.answers = [lambda log, request: log.said(reached("a", request.cut, {0: 10**9, 77: 5}))]
    report = learner.interruption.cut(V0, digest(0))
    assert (report.answered, report.caught_up) == (("a",), True)
