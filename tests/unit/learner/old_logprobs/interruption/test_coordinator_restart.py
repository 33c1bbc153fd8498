"""Cuts and scores after a restart of the learner."""

from pathlib import Path

import msgspec
import torch

from palimpsest.common.bus.port import Outgoing
from palimpsest.common.messages import (
    DEAD_LETTERS,
    OLD_LOGPROBS,
    WORKERS,
    encode,
)
from palimpsest.common.rejected_record import RejectCause
from palimpsest.services.learner.distributed import ProcessGroup
from palimpsest.services.learner.old_logprobs.distributed_scorer import DistributedScorer, model_scorer
from tests.learner_parts.interruption import (
    Learner,
    Log,
    Table,
    a_flush,
    alive,
    digest,
    flushing,
)
from tests.learner_parts.models import CPU, load
from tests.records.builders import a_finished, a_segment
from tests.unit.learner.old_logprobs.interruption.cuts import V0, known, requests


def test_a_restart_between_scoring_and_step_restores_every_value_bit_for_bit(starting_model: Path, log: Log) -> None:
    """No token is scored twice: the repeated cut costs only the workers' flushes."""
    model = load(starting_model)
    log.report(alive("a"))
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
