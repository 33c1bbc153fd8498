"""The eager scorer scores tokens of the resident version only, each once, and durably before it returns."""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from blake3 import blake3

from palimpsest.common.arrays import unpack_float32
from palimpsest.common.messages import OLD_LOGPROBS
from palimpsest.common.versions import Version
from palimpsest.services.learner import instruments
from palimpsest.services.learner.batch.batching import PaddedBatch
from palimpsest.services.learner.buffer.flushes import Flushed
from palimpsest.services.learner.distributed import ProcessGroup
from palimpsest.services.learner.ingest.trajectory_reader import ReceivedTrajectory
from palimpsest.services.learner.old_logprobs.distributed_scorer import DistributedScorer, model_scorer
from palimpsest.services.learner.old_logprobs.eager_scorer import EagerScorer, as_row
from palimpsest.services.learner.old_logprobs.score_store import ScoreStore
from tests.learner_parts.interruption import RUN, Log, Table, a_flush, digest
from tests.learner_parts.models import CPU, load, logprobs
from tests.records.builders import a_finished, a_segment

MIXED = ReceivedTrajectory(
    a_finished(0, 0, tokens=12, segments=(a_segment(2, 4, 0), a_segment(4, 7, 1), a_segment(9, 11, 1))), 0, 4
)
V0, V1 = Version(0), Version(1)


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Log]:
    log = Log(tmp_path)
    yield log
    log.close()


def an_eager_scorer(
    score: Table, durable: Log | None = None, *, micro_batch_tokens: int = 1000
) -> tuple[EagerScorer, ScoreStore]:
    scores = ScoreStore()
    return EagerScorer(score, scores, run=RUN, micro_batch_tokens=micro_batch_tokens, durable=durable), scores


def many(count: int) -> list[ReceivedTrajectory]:
    return [ReceivedTrajectory(a_finished(0, i, tokens=8 + i % 3), i % 2, i) for i in range(count)]


def test_only_tokens_of_the_resident_version_are_scored(log: Log) -> None:
    eager, scores = an_eager_scorer(Table(1), log)
    assert eager.work([MIXED], V1, digest(1)) == 5
    known = scores.attach(as_row(MIXED.record), {V0: digest(0), V1: digest(1)})
    assert known.old is not None
    scored = [4, 5, 6, 9, 10]
    assert np.flatnonzero(~np.isnan(known.old)).tolist() == scored
    assert known.old[scored].tolist() == Table(1).value(known.tokens[scored]).tolist()
    assert scores.missing(known) == [(2, 4, V0)]


def test_a_record_names_the_weights_the_span_and_the_tokens_up_to_its_end(log: Log) -> None:
    eager, _ = an_eager_scorer(Table(1), log)
    eager.work([MIXED], V1, digest(1))
    first, second = log.scored()
    assert (first.start, first.stop, second.start, second.stop) == (4, 7, 9, 11)
    for record in (first, second):
        assert (record.run, record.trajectory, record.by) == (RUN, "g000000/0", "learner")
        assert (record.version, record.digest) == (1, digest(1))
        assert record.prefix == blake3(MIXED.record.tokens[: 4 * record.stop]).hexdigest()
    assert unpack_float32(second.values).tolist() == Table(1).value([10, 11]).tolist()


def test_known_tokens_are_not_scored_again_even_by_another_process(log: Log) -> None:
    table = Table(1)
    eager, _ = an_eager_scorer(table, log)
    assert [eager.work([MIXED], V1, digest(1)) for _ in range(3)] == [5, 0, 0]
    again, scores = an_eager_scorer(table, log)
    for record in log.scored():
        scores.put(record)
    assert again.work([MIXED], V1, digest(1)) == 0
    assert table.rows == 1
    assert len(log.scored()) == 2


def test_the_same_version_number_with_another_digest_is_another_policy(log: Log) -> None:
    eager, _ = an_eager_scorer(Table(1), log)
    eager.work([MIXED], V1, digest(1))
    assert eager.work([MIXED], V1, "digest of other weights") == 5
    assert {record.digest for record in log.scored()} == {digest(1), "digest of other weights"}


def test_only_the_new_tokens_of_a_longer_flush_are_scored(log: Log) -> None:
    eager, _ = an_eager_scorer(Table(0), log)
    eager.work([Flushed(a_flush(0, 0, tokens=6, segments=(a_segment(2, 6, 0),)), 0, 0)], V0, digest(0))
    whole = ReceivedTrajectory(a_finished(0, 0, tokens=10, segments=(a_segment(2, 9, 0),)), 0, 1)
    assert eager.work([whole], V0, digest(0)) == 3
    assert [(record.start, record.stop) for record in log.scored()] == [(2, 6), (6, 9)]


def test_a_second_sampling_with_other_tokens_gets_its_own_values(log: Log) -> None:
    eager, scores = an_eager_scorer(Table(0), log)
    first = Flushed(a_flush(0, 0, tokens=[5, 6, 7, 8, 9, 10]), 0, 0)
    second = Flushed(a_flush(0, 0, tokens=[5, 6, 70, 80, 90, 100]), 0, 1)
    assert eager.work([first, second], V0, digest(0)) == 8
    for flushed in (first, second):
        row = scores.attach(as_row(flushed.record), {V0: digest(0)})
        assert row.old is not None
        assert row.old[2:6].tolist() == Table(0).value(row.tokens[2:6]).tolist()
    assert scores.conflicts == 0


def test_each_call_scores_one_micro_batch_and_the_next_call_continues(log: Log) -> None:
    eager, _ = an_eager_scorer(Table(0), log, micro_batch_tokens=20)
    arrived, counts, asked = many(9), [], []
    while count := eager.work(arrived, V0, digest(0), should_stop=lambda: not asked.append(1)):  # type: ignore[func-returns-value]
        counts.append(count)
    assert sum(counts) == 9 * 4
    assert max(counts) <= 3 * 4, "rows cut at 6 tokens, so three of them are within 20"
    assert len(counts) == len(asked) == 3
    assert all(eager.is_done(one) for one in arrived)


def test_only_scored_tokens_are_done_and_removed_trajectories_leave_the_queue(log: Log) -> None:
    table = Table(0)
    eager, _ = an_eager_scorer(table, log, micro_batch_tokens=6)
    arrived = many(3)
    eager.work(arrived, V0, digest(0), should_stop=lambda: True)
    assert [eager.is_done(one) for one in arrived] == [True, False, False]
    assert eager.work(arrived[:2], V0, digest(0)) == 4
    assert [eager.is_done(one) for one in arrived] == [True, True, False]
    assert table.rows == 2


def test_the_next_version_discards_unscored_tokens_of_the_previous_one(log: Log) -> None:
    table = Table(0)
    eager, _ = an_eager_scorer(table, log, micro_batch_tokens=6)
    arrived = many(3)
    eager.work(arrived, V0, digest(0), should_stop=lambda: True)
    table.version = 1
    assert eager.work(arrived, V1, digest(1)) == 0
    assert len(log.scored()) == 1


def test_values_are_on_the_log_before_they_are_used(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    def down(*_: object) -> None:
        raise OSError("the log is away")

    eager, scores = an_eager_scorer(Table(0), log)
    monkeypatch.setattr(log, "publish", down)
    with pytest.raises(OSError, match="the log is away"):
        eager.work(many(2), V0, digest(0))
    assert len(scores) == 0


def test_without_a_log_the_values_stay_in_this_process(log: Log) -> None:
    eager, scores = an_eager_scorer(Table(0))
    assert eager.work(many(4), V0, digest(0)) == 16
    assert len(scores) == 4
    assert OLD_LOGPROBS not in log.order


def test_a_nonfinite_score_is_counted_and_stays_missing(log: Log) -> None:
    class Broken(Table):
        def __call__(self, batches: Sequence[PaddedBatch]) -> list[np.ndarray]:  # type: ignore[type-arg]
            values = super().__call__(batches)
            for value in values:
                value[:, 3] = np.nan
                value[:, 5] = -np.inf
            return values

    eager, scores = an_eager_scorer(Broken(0), log)
    before = instruments.OLD_UNSCORABLE._value.get()
    one = many(1)
    assert eager.work(one, V0, digest(0)) == 3
    assert eager.work(one, V0, digest(0)) == 0, "asked again, it would say the same"
    assert scores.missing(scores.attach(as_row(one[0].record), {V0: digest(0)})) == [(3, 4, V0)]
    assert instruments.OLD_UNSCORABLE._value.get() == before + 1
    assert [(r.start, r.stop) for r in log.scored()] == [(2, 3), (4, 6)]
    assert unpack_float32(log.scored()[1].values).tolist()[1] == -np.inf, "an underflow is a value, a NaN is none"


def test_scores_equal_those_of_plain_transformers(starting_model: Path, log: Log) -> None:
    """Each trajectory is scored at its temperature and after its prefix, independent of other rows."""
    model, draw, scores = load(starting_model), random.Random(3), ScoreStore()
    eager = EagerScorer(
        DistributedScorer(ProcessGroup(), model_scorer(model, CPU)), scores, run=RUN, micro_batch_tokens=64, durable=log
    )
    sampled = []
    for i in range(6):
        tokens = [draw.randrange(3, 250) for _ in range(9 + 2 * i)]
        segments = (a_segment(2, 5, 0), a_segment(6, 8 + i, 0))
        flush = a_flush(0, i, tokens=tokens, segments=segments)
        sampled.append(Flushed(msgspec.structs.replace(flush, temperature=0.5 + 0.25 * i), 0, i))
    eager.work(sampled, V0, digest(0))
    for flushed in sampled:
        row = scores.attach(as_row(flushed.record), {V0: digest(0)})
        plain = [0.0, *logprobs(model, row.tokens.tolist(), row.temperature)]
        assert scores.missing(row) == []
        assert row.old is not None
        for t in np.flatnonzero(row.versions == 0):
            assert float(row.old[t]) == pytest.approx(plain[t], abs=4e-3)


def test_scoring_between_backward_and_step_changes_neither_weights_nor_gradients(
    starting_model: Path, log: Log
) -> None:
    model = load(starting_model)
    tokens = torch.tensor([[5, 6, 7, 8]])
    model(input_ids=tokens).logits.float().square().mean().backward()
    before = [(p.detach().clone(), p.grad.clone()) for p in model.parameters() if p.grad is not None]
    eager = EagerScorer(
        DistributedScorer(ProcessGroup(), model_scorer(model, CPU)),
        ScoreStore(),
        run=RUN,
        micro_batch_tokens=64,
        durable=log,
    )
    assert eager.work(many(3), V0, digest(0)) == 12
    after = [(p, p.grad) for p in model.parameters() if p.grad is not None]
    assert before
    assert all(torch.equal(a, b) and torch.equal(c, d) for (a, c), (b, d) in zip(before, after, strict=True))  # type: ignore[arg-type]
