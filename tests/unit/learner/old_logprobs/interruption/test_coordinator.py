"""The learner's side of a cut, on a real log: which workers it waits for, and which tokens it scores."""

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
    """Old log-probs of the record's tokens, nan where a token has none."""
    row = learner.scores.attach(as_row(record), {Version(version): digest(version)})
    assert row.old is not None
    return [float(value) for value in row.old]


def test_a_cut_scores_finished_and_live_trajectories_durably(log: Log) -> None:
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


def test_a_cut_publishes_the_request_first_and_the_scores_before_it_returns(log: Log) -> None:
    log.said(alive("a"))
    learner = Learner(log, Table(0))
    log.order.clear()
    log.answers = [flushing("a", a_flush(1, 0))]
    learner.interruption.cut(V0, digest(0))
    assert log.order == [CONTROL, TRAJECTORIES, WORKERS, OLD_LOGPROBS]


def test_scored_flushes_are_resolved_and_their_trajectories_stay_pending(log: Log) -> None:
    log.said(alive("a"))
    learner = Learner(log, Table(0))
    log.answers = [flushing("a", a_flush(1, 0), a_flush(2, 0))]
    learner.interruption.cut(V0, digest(0))
    assert len(learner.reader.flushed) == 0
    assert learner.reader.offsets() == learner.reader._consumer.ends()
    assert learner.ledger.counts()["pending"] == 8, "a flush changes nothing in the ledger"


def test_a_worker_without_an_answer_is_left_out_at_the_deadline(log: Log) -> None:
    log.said(alive("a"), alive("dead"))
    learner = Learner(log, Table(0), clock=Ticking(0.2))
    log.answers = [flushing("a", a_flush(1, 0))]
    before = instruments.LATE_WORKERS._value.get()
    report = learner.interruption.cut(V0, digest(0))
    assert (report.answered, report.late) == (("a",), ("dead",))
    assert report.tokens_scored == 4, "flushes of the other workers are scored"
    assert 5.0 <= report.stall_s < ALIVE_S
    assert instruments.LATE_WORKERS._value.get() == before + 1


def test_a_cut_waits_for_a_silent_worker_at_most_until_it_counts_as_dead(log: Log) -> None:
    log.said(alive("dead"))
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
    log.said(alive("a"))
    learner = Learner(log, Table(0))

    def new_worker(log: Log, request: CutRequested) -> None:
        log.said(alive("new"))
        log.said(reached("new", request.cut, log.sampled(a_flush(3, 0, worker="new"))))

    log.answers = [flushing("a", a_flush(1, 0)), new_worker]
    report = learner.interruption.cut(V0, digest(0))
    assert report.answered == ("a", "new")
    assert report.tokens_scored == 8


def test_answers_to_an_earlier_cut_do_not_count(log: Log) -> None:
    log.said(alive("a"))
    learner = Learner(log, Table(0), clock=Ticking(0.2))
    assert learner.interruption.cut(V0, digest(0)).late == ("a",)
    before = instruments.LATE_ANSWERS._value.get()
    log.answers = [lambda log, request: log.said(reached("a", request.cut - 1, {0: 10**9}))]
    report = learner.interruption.cut(V0, digest(0))
    assert (report.cut, report.answered, report.late) == (2, (), ("a",))
    assert instruments.LATE_ANSWERS._value.get() == before + 1


def test_a_late_worker_loses_the_scores_of_its_flush_only(log: Log) -> None:
    """Its tokens belong to weights that the learner has replaced; they are never scored with others."""
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
    assert instruments.LATE_TOKENS._value.get() == before[0] + 4, "the next flush has the same tokens; they count once"
    assert [(r.version, r.start, r.stop) for r in log.scored()] == [(1, 8, 12)]


def test_trajectories_are_scored_while_waiting_for_a_batch_and_not_again_at_the_cut(log: Log) -> None:
    log.said(alive("a"))
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


def test_two_samplings_of_one_id_are_scored_separately(log: Log) -> None:
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


def test_a_restart_between_scoring_and_step_restores_every_value_bit_for_bit(starting_model: Path, log: Log) -> None:
    """No token is scored twice: the repeated cut costs only the workers' flushes."""
    model = load(starting_model)
    log.said(alive("a"))
    before = Learner(log, DistributedScorer(ProcessGroup(), model_scorer(model, CPU)))
    log.sampled(a_finished(0, 0), a_finished(0, 1, tokens=12, segments=(a_segment(2, 11, 0),)))
    flushes = [a_flush(1, 0), a_flush(1, 1, tokens=20, segments=(a_segment(4, 20, 0),))]
    log.answers = [flushing("a", *flushes)]
    first = before.interruption.cut(V0, digest(0))
    assert first.tokens_scored == 4 + 9 + 4 + 16
    before.close()

    count, generator_state = len(log.scored()), torch.get_rng_state()
    after = Learner(log, DistributedScorer(ProcessGroup(), model_scorer(model, CPU)), before=before)
    log.announced(0)
    after.read()
    assert after.interruption.work(V0, digest(0)) == 0
    second = after.interruption.cut(V0, digest(0))
    assert (second.cut, second.tokens_scored, second.flushed) == (2, 0, 2)
    assert len(log.scored()) == count
    assert torch.equal(torch.get_rng_state(), generator_state)
    for record in [*flushes, *(arrived.record for arrived in after.reader.arrived.values())]:
        expected, values = known(before, record), known(after, record)  # type: ignore[arg-type]
        assert [v for v in values if v == v]
        assert torch.equal(torch.tensor(expected).nan_to_num(9.0), torch.tensor(values).nan_to_num(9.0))


def test_a_restart_without_the_logged_values_would_score_them_again(log: Log) -> None:
    """The log alone prevents repeated scoring."""
    learner = Learner(log, Table(0))
    log.sampled(a_finished(0, 0))
    learner.read()
    assert learner.interruption.cut(V0, digest(0)).tokens_scored == 4
    learner.scores.forget("g000000/0")
    learner.scorer._done.clear()
    assert learner.interruption.cut(V0, digest(0)).tokens_scored == 4


def test_a_restart_skips_scores_of_resolved_trajectories(log: Log) -> None:
    before = Learner(log, Table(0))
    log.sampled(a_finished(0, 0), a_finished(0, 1), a_finished(1, 0))
    before.read()
    before.interruption.cut(V0, digest(0))
    resolved = [arrived for name, arrived in before.reader.arrived.items() if name.startswith("g000000")]
    state = before.ledger.state()
    del state.open_groups["g000000"]  # the group was trained
    before.ledger.restore(state, now=0.0)
    for arrived in resolved:
        before.reader.resolve(arrived)
    assert len(before.scores) == 1
    after = Learner(log, Table(0), before=before)
    assert len(after.scores) == 1
    assert after.scores.digests == {V0: digest(0)}


def test_garbage_among_the_scores_is_dead_lettered_and_does_not_stop_a_restart(log: Log) -> None:
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
    assert after.ledger.counts()["dead_lettered"] == 0, "none of the records is a trajectory"


def test_workers_of_another_run_are_ignored(log: Log) -> None:
    learner = Learner(log, Table(0))
    stranger = alive("a")
    log.said(msgspec.structs.replace(stranger, run="another"))
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

    log.said(alive("a"))
    learner = Learner(log, fails)
    learner.interruption.release()
    log.answers = [flushing("a", a_flush(1, 0))]
    with pytest.raises(OutOfMemory):
        learner.interruption.cut(V0, digest(0))
    learner.interruption.release()
    learner.interruption.release()
    assert [m for m in log.messages(CONTROL) if isinstance(m, CutReleased)] == [CutReleased(RUN, 1)]


def test_a_finished_cut_is_never_released(log: Log) -> None:
    """Workers must not sample its version again: after a restart, the checkpoint may be of the next version."""
    learner = Learner(log, Table(0))
    learner.interruption.cut(V0, digest(0))
    learner.interruption.release()
    assert [m for m in log.messages(CONTROL) if isinstance(m, CutReleased)] == []


class OnRead(Protocol):
    """Called when the learner reads the worker topic for the n-th time since the cut request."""

    def __call__(self, read: int) -> None: ...


class RemoteLog(Log):
    """A log over a network: a poll with a timeout of 0 returns nothing, because records are in transit."""

    on_read: OnRead | None = None
    reads = 0

    def consumer(self, topic: str, *, group: str | None = None, member: str = "") -> SqliteConsumer:
        """See Bus."""
        consumer = super().consumer(topic, group=group, member=member)
        poll, ends = consumer.poll, consumer.ends

        def patient(*, limit: int, timeout_s: float) -> list[Record]:
            return poll(limit=limit, timeout_s=timeout_s) if timeout_s else []

        def answered() -> dict[int, int]:
            if topic == WORKERS and self.on_read is not None and requests(self):
                self.reads += 1
                self.on_read(self.reads)
            return ends()

        consumer.poll, consumer.ends = patient, answered  # type: ignore[method-assign]
        return consumer


@pytest.fixture
def remote(tmp_path: Path) -> Iterator[RemoteLog]:
    log = RemoteLog(tmp_path / "remote")
    log.announced(0)
    yield log
    log.close()


def test_a_cut_waits_for_workers_whose_records_are_in_transit(remote: RemoteLog) -> None:
    learner = Learner(remote, Table(0))
    remote.said(alive("a"), alive("b"))
    remote.answers = [flushing("a", a_flush(1, 0)), flushing("b", a_flush(2, 0, worker="b"))]
    report = learner.interruption.cut(V0, digest(0))
    assert (report.answered, report.late, report.tokens_scored) == (("a", "b"), (), 8)


def test_a_cut_scores_finished_trajectories_that_are_in_transit(remote: RemoteLog) -> None:
    learner = Learner(remote, Table(0))
    remote.sampled(a_finished(0, 0))
    assert learner.interruption.cut(V0, digest(0)).tokens_scored == 4


@pytest.mark.parametrize("out_s", [60.0, 400.0])
def test_an_outage_of_the_log_extends_the_deadline_of_the_workers(out_s: float, remote: RemoteLog) -> None:
    """Also two outages; the flushed tokens are scored."""
    clock = Ticking()
    learner = Learner(remote, Table(0), clock=clock)
    remote.said(alive("a"), alive("b"))

    def on_read(read: int) -> None:
        match read:
            case 1 | 3:
                clock.now += out_s
            case 5:
                flushing("a", a_flush(1, 0))(remote, requests(remote)[-1])
            case 7:
                flushing("b", a_flush(2, 0, worker="b"))(remote, requests(remote)[-1])

    remote.on_read = on_read
    report = learner.interruption.cut(V0, digest(0))
    assert (report.answered, report.late, report.tokens_scored) == (("a", "b"), (), 8)


@pytest.mark.thorough
def test_repeated_outages_extend_a_cut_up_to_a_limit(remote: RemoteLog) -> None:
    clock = Ticking()
    learner = Learner(remote, Table(0), clock=clock)
    remote.said(alive("dead"))

    def on_read(read: int) -> None:
        clock.now += 6.0

    remote.on_read = on_read
    report = learner.interruption.cut(V0, digest(0))
    assert report.late == ("dead",)
    assert MOST_LOST_S < report.stall_s < MOST_LOST_S + 20


def test_after_an_outage_a_cut_waits_for_workers_from_before_it(remote: RemoteLog) -> None:
    """The learner trained during the outage, and no worker has published since."""
    clock = Ticking()
    learner = Learner(remote, Table(0), clock=clock)
    remote.said(alive("a"))
    remote.answers = [flushing("a")]
    learner.interruption.cut(V0, digest(0))
    clock.now += 60.0
    remote.answers = []

    def on_read(read: int) -> None:
        if len(requests(remote)) == 2 and read == remote.reads >= 8:
            flushing("a", a_flush(1, 0))(remote, requests(remote)[-1])
            remote.on_read = None

    remote.on_read = on_read
    report = learner.interruption.cut(V0, digest(0))
    assert (report.answered, report.late, report.tokens_scored) == (("a",), (), 4)


@pytest.mark.thorough
def test_few_cuts_wait_for_a_dead_worker(log: Log) -> None:
    log.said(alive("dead"))
    clock = Ticking(0.05)
    learner = Learner(log, Table(0), clock=clock)
    asked = []
    for _ in range(4):
        asked.append(learner.interruption.cut(V0, digest(0)).workers)
        clock.now += 60.0
    assert asked == [("dead",), ("dead",), (), ()]


def test_the_cut_number_of_another_learner_is_not_reused(log: Log) -> None:
    """Workers would treat a second request with that number as a duplicate."""
    log.said(alive("a"))
    learner = Learner(log, Table(0))
    log.said(reached("a", 1))
    log.answers = [flushing("a", a_flush(1, 0))]
    assert learner.interruption.cut(V0, digest(0)).cut == 2


def test_a_restart_does_not_read_scores_from_before_its_checkpoint(log: Log) -> None:
    log.publish(OLD_LOGPROBS, [Outgoing("x", b"published before the first offer")])
    before = Learner(log, Table(0))
    log.sampled(a_finished(0, 0))
    before.read()
    before.interruption.cut(V0, digest(0))
    count = len(log.messages(DEAD_LETTERS))
    after = Learner(log, Table(0), before=before)
    assert len(after.scores) == 1
    assert len(log.messages(DEAD_LETTERS)) == count, "the garbage is not read again"


def test_cut_numbers_continue_after_a_restart(log: Log) -> None:
    first = Learner(log, Table(0))
    assert [first.interruption.cut(V0, digest(0)).cut for _ in range(2)] == [1, 2]
    assert Learner(log, Table(0), before=first).interruption.cut(V0, digest(0)).cut == 3
    assert [request.cut for request in requests(log)] == [1, 2, 3]


def test_impossible_positions_do_not_block_the_learner(log: Log) -> None:
    log.said(alive("a"))
    learner = Learner(log, Table(0))
    log.answers = [lambda log, request: log.said(reached("a", request.cut, {0: 10**9, 77: 5}))]
    report = learner.interruption.cut(V0, digest(0))
    assert (report.answered, report.caught_up) == (("a",), True)
