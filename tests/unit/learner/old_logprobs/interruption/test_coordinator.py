"""The learner's side of a cut, on a real log: which workers it waits for, and which tokens it scores."""

from collections.abc import Sequence

import msgspec
import pytest

from palimpsest.common.arrays import Float32Array, pack_int32
from palimpsest.common.messages import (
    CONTROL,
    OLD_LOGPROBS,
    TRAJECTORIES,
    WORKERS,
    CutReleased,
    CutRequested,
)
from palimpsest.common.snapshots.fencing import Fenced
from palimpsest.services.learner import instruments
from palimpsest.services.learner.batch.batching import PaddedBatch
from palimpsest.services.learner.old_logprobs.interruption.liveness import ALIVE_S
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
from tests.records.builders import a_finished, a_segment
from tests.unit.learner.old_logprobs.interruption.cuts import V0, V1, known, requests


def test_a_cut_scores_finished_and_live_trajectories_durably(log: Log) -> None:
    log.report(alive("a"), alive("b"))
    learner = Learner(log, Table(0))
    log.sampled(a_finished(0, 0), a_finished(0, 1, segments=(a_segment(3, 7, 0),)))
    log.answers = [flushing("a", a_flush(1, 0), a_flush(1, 1)), flushing("b", a_flush(2, 0, worker="b"))]
    report = learner.interruption.cut(V0, digest(0))
    assert (report.cut, report.version) == (1, 0)
    assert (report.workers, report.answered, report.late) == (("a", "b"), ("a", "b"), ())
    assert (report.tokens_scored, report.flushed, report.caught_up, report.fenced) == (20, 3, True, False)
    assert report.stall_s > 0
    assert set(report.seconds) == {"before", "request", "wait", "read", "score"}
    assert [request.deadline_s for request in requests(log)] == [5.0]
    assert sorted(record.trajectory for record in log.scored()) == sorted(
        ["g000000/0", "g000000/1", "g000001/0", "g000001/1", "g000002/0"]
    )
    last = known(learner, a_flush(2, 0))
    assert last[2:6] == pytest.approx(Table(0).value([3, 4, 5, 6]).tolist())


def test_a_cut_publishes_the_request_first_and_the_scores_before_it_returns(log: Log) -> None:
    log.report(alive("a"))
    learner = Learner(log, Table(0))
    log.order.clear()
    log.answers = [flushing("a", a_flush(1, 0))]
    learner.interruption.cut(V0, digest(0))
    assert log.order == [CONTROL, TRAJECTORIES, WORKERS, OLD_LOGPROBS]


def test_scored_flushes_are_resolved_and_their_trajectories_stay_pending(log: Log) -> None:
    log.report(alive("a"))
    learner = Learner(log, Table(0))
    log.answers = [flushing("a", a_flush(1, 0), a_flush(2, 0))]
    learner.interruption.cut(V0, digest(0))
    assert len(learner.reader.flushed) == 0
    assert learner.reader.offsets() == learner.reader._consumer.ends()
    assert learner.ledger.counts()["pending"] == 8, "a flush changes nothing in the ledger"


def test_a_worker_without_an_answer_is_left_out_at_the_deadline(log: Log) -> None:
    log.report(alive("a"), alive("dead"))
    learner = Learner(log, Table(0), clock=Ticking(0.2))
    log.answers = [flushing("a", a_flush(1, 0))]
    before = instruments.LATE_WORKERS._value.get()
    report = learner.interruption.cut(V0, digest(0))
    assert (report.answered, report.late) == (("a",), ("dead",))
    assert report.tokens_scored == 4, "flushes of the other workers are scored"
    assert 5.0 <= report.stall_s < ALIVE_S
    assert instruments.LATE_WORKERS._value.get() == before + 1


def test_a_cut_waits_for_a_silent_worker_at_most_until_it_counts_as_dead(log: Log) -> None:
    log.report(alive("dead"))
    learner = Learner(log, Table(0), clock=Ticking(0.5), deadline_s=1e9)
    report = learner.interruption.cut(V0, digest(0))
    assert report.late == ("dead",)
    assert report.stall_s < 2 * ALIVE_S
    assert learner.interruption.cut(V0, digest(0)).workers == (), "a dead worker is not waited for"


def test_a_cut_without_workers_scores_finished_trajectories(log: Log) -> None:
    learner = Learner(log, Table(0))
    log.sampled(a_finished(0, 0))
    learner.read()
    report = learner.interruption.cut(V0, digest(0))
    assert (report.workers, report.tokens_scored) == ((), 4)


def test_a_cut_waits_for_a_worker_that_starts_while_it_is_open(log: Log) -> None:
    log.report(alive("a"))
    learner = Learner(log, Table(0))

    def new_worker(log: Log, request: CutRequested) -> None:
        log.report(alive("new"))
        log.report(reached("new", request.cut, log.sampled(a_flush(3, 0, worker="new"))))

    log.answers = [flushing("a", a_flush(1, 0)), new_worker]
    report = learner.interruption.cut(V0, digest(0))
    assert report.answered == ("a", "new")
    assert report.tokens_scored == 8


def test_answers_to_an_earlier_cut_do_not_count(log: Log) -> None:
    log.report(alive("a"))
    learner = Learner(log, Table(0), clock=Ticking(0.2))
    assert learner.interruption.cut(V0, digest(0)).late == ("a",)
    before = instruments.LATE_ANSWERS._value.get()
    log.answers = [lambda log, request: log.report(reached("a", request.cut - 1, {0: 10**9}))]
    report = learner.interruption.cut(V0, digest(0))
    assert (report.cut, report.answered, report.late) == (2, (), ("a",))
    assert instruments.LATE_ANSWERS._value.get() == before + 1


def test_a_late_worker_loses_the_scores_of_its_flush_only(log: Log) -> None:
    """Its tokens belong to weights that the learner has replaced; they are never scored with others."""
    table = Table(0)
    log.report(alive("a"))
    learner = Learner(log, table, clock=Ticking(0.2))
    assert learner.interruption.cut(V0, digest(0)).late == ("a",)
    table.version = 1
    log.announced(1)
    learner.interruption.published(V1, digest(1))
    late, fresh = a_flush(1, 0), a_flush(1, 0, cut=2, tokens=12, segments=(a_segment(2, 6, 0), a_segment(8, 12, 1)))
    log.report(reached("a", 1, log.sampled(late)))
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
    assert instruments.LATE_TOKENS._value.get() == before[0] + 4, "the next flush has the same tokens; they count once"
    assert [(r.version, r.start, r.stop) for r in log.scored()] == [(1, 8, 12)]


def test_trajectories_are_scored_while_waiting_for_a_batch_and_not_again_at_the_cut(log: Log) -> None:
    log.report(alive("a"))
    learner = Learner(log, Table(0))
    log.sampled(a_finished(0, 0), a_finished(0, 1))
    learner.read()
    assert learner.interruption.work(V0, digest(0)) == 8
    assert learner.interruption.work(V0, digest(0)) == 0
    log.answers = [flushing("a")]
    assert learner.interruption.cut(V0, digest(0)).tokens_scored == 0


def test_scoring_while_waiting_is_bounded_per_call(log: Log) -> None:
    learner = Learner(log, Table(0), clock=Ticking(1.0), micro_batch_tokens=8)
    log.sampled(*(a_finished(group, sample) for group in range(4) for sample in range(2)))
    learner.read()
    assert learner.interruption.work(V0, digest(0)) == 4, "one micro-batch uses up the time of a call"
    assert sum(iter(lambda: learner.interruption.work(V0, digest(0)), 0)) == 28


def test_trajectories_in_training_are_not_scored(log: Log) -> None:
    learner = Learner(log, Table(0))
    log.sampled(a_finished(0, 0), a_finished(0, 1), a_finished(1, 0))
    learner.read()
    report = learner.interruption.cut(V0, digest(0), training={"g000000/0", "g000000/1"})
    assert report.tokens_scored == 4
    assert [record.trajectory for record in log.scored()] == ["g000001/0"]


def test_a_flushed_trajectory_that_finishes_is_scored_once(log: Log) -> None:
    """Within one cut, the finished record replaces the flush; at a later cut, only the new tokens are scored."""
    log.report(alive("a"))
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


def test_two_samplings_of_one_id_are_scored_separately(log: Log) -> None:
    log.report(alive("a"), alive("b"))
    learner = Learner(log, Table(0))
    first, second = a_flush(1, 0, tokens=[5, 6, 7, 8, 9, 10]), a_flush(1, 0, tokens=[5, 6, 70, 80, 90, 100], worker="b")
    log.answers = [flushing("a", first), flushing("b", second)]
    assert learner.interruption.cut(V0, digest(0)).tokens_scored == 8
    assert known(learner, first)[2:] == pytest.approx(Table(0).value([7, 8, 9, 10]).tolist())
    assert known(learner, second)[2:] == pytest.approx(Table(0).value([70, 80, 90, 100]).tolist())
    log.sampled(msgspec.structs.replace(a_finished(1, 0), tokens=pack_int32([5] * 6)))
    learner.read()
    log.answers = [flushing("a"), flushing("b")]
    assert learner.interruption.cut(V0, digest(0)).tokens_scored == 4, "neither flush has these tokens"


def test_a_dropped_trajectory_leaves_no_flush_and_no_scores(log: Log) -> None:
    learner = Learner(log, Table(0))
    log.sampled(a_flush(1, 0))
    learner.read()
    learner.interruption.work(V0, digest(0))
    assert len(learner.scores) == 1
    log.sampled(a_flush(1, 0, tokens=9, segments=(a_segment(2, 9, 0),)))
    learner.read()
    learner.reader.forget("g000001/0")
    assert (len(learner.reader.flushed), len(learner.scores)) == (0, 0)


def test_workers_of_another_run_are_ignored(log: Log) -> None:
    learner = Learner(log, Table(0))
    stranger = alive("a")
    log.report(msgspec.structs.replace(stranger, run="another"))
    assert learner.interruption.cut(V0, digest(0)).workers == ()


def test_a_replaced_learner_requests_no_cut_and_does_not_raise(log: Log) -> None:
    """Other ranks wait in a collective during the cut; the loop raises right after it."""
    fenced = False

    def confirm() -> None:
        if fenced:
            raise Fenced("another learner took over this run")

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


def test_a_failed_cut_is_released_once(log: Log) -> None:
    def fails(batches: Sequence[PaddedBatch]) -> list[Float32Array]:
        raise OutOfMemory

    log.report(alive("a"))
    learner = Learner(log, fails)
    learner.interruption.release()
    log.answers = [flushing("a", a_flush(1, 0))]
    with pytest.raises(OutOfMemory):
        learner.interruption.cut(V0, digest(0))
    learner.interruption.release()
    learner.interruption.release()
    assert [m for m in log.messages(CONTROL) if isinstance(m, CutReleased)] == [CutReleased(RUN, 1, 1)]


def test_a_finished_cut_is_never_released(log: Log) -> None:
    """Workers must not sample its version again: after a restart, the checkpoint may be of the next version."""
    learner = Learner(log, Table(0))
    learner.interruption.cut(V0, digest(0))
    learner.interruption.release()
    assert [m for m in log.messages(CONTROL) if isinstance(m, CutReleased)] == []


@pytest.mark.thorough
def test_few_cuts_wait_for_a_dead_worker(log: Log) -> None:
    log.report(alive("dead"))
    clock = Ticking(0.05)
    learner = Learner(log, Table(0), clock=clock)
    asked = []
    for _ in range(4):
        asked.append(learner.interruption.cut(V0, digest(0)).workers)
        clock.now += 60.0
    assert asked == [("dead",), ("dead",), (), ()]


def test_the_cut_number_of_another_learner_is_not_reused(log: Log) -> None:
    """Workers would treat a second request with that number as a duplicate."""
    log.report(alive("a"))
    learner = Learner(log, Table(0))
    log.report(reached("a", 1))
    log.answers = [flushing("a", a_flush(1, 0))]
    assert learner.interruption.cut(V0, digest(0)).cut == 2


def test_impossible_positions_do_not_block_the_learner(log: Log) -> None:
    log.report(alive("a"))
    learner = Learner(log, Table(0))
    log.answers = [lambda log, request: log.report(reached("a", request.cut, {0: 10**9, 77: 5}))]
    report = learner.interruption.cut(V0, digest(0))
    assert (report.answered, report.caught_up) == (("a",), True)
