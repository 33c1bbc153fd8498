"""The score store: a value is a token's old log-prob only if version, weights, and prefix match."""

import itertools
import random

import numpy as np
import pytest

from palimpsest.common.arrays import pack_float32, pack_int32
from palimpsest.common.messages import OldLogprobsComputed
from palimpsest.common.rejected_record import RejectCause
from palimpsest.common.trajectory import MalformedTrajectory
from palimpsest.common.versions import Version
from palimpsest.services.learner.batch.batching import Row
from palimpsest.services.learner.old_logprobs.score_store import (
    ScoreStore,
    check_computed,
    computed_of,
    old_logprobs_record,
    prefix_digest,
    spans,
)
from tests.records.builders import a_row

DIGESTS = {Version(v): f"weights {v}" for v in range(4)}
TOKENS = [5, 6, 7, 8, 9, 10]
VERSIONS = [-1, 0, 0, -1, 1, 1]


def row(tokens: list[int] = TOKENS, versions: list[int] = VERSIONS) -> Row:
    return a_row("g000000/0", tokens, versions)


def a_score(
    start: int,
    stop: int,
    version: int,
    values: list[float],
    *,
    tokens: list[int] = TOKENS,
    digest: str | None = None,
    trajectory: str = "g000000/0",
) -> OldLogprobsComputed:
    return old_logprobs_record(
        run="test", trajectory=trajectory, by="replica-0", tokens=pack_int32(tokens), start=start, stop=stop,
        version=Version(version), digest=digest or f"weights {version}", values=np.array(values, dtype=np.float32),
    )  # fmt: skip


def known(scores: ScoreStore, of: Row) -> list[float | None]:
    old = scores.attach(of, DIGESTS).old
    return [None] * len(of.tokens) if old is None else [None if np.isnan(v) else float(v) for v in old]


def test_a_value_is_attached_to_its_tokens() -> None:
    scores = ScoreStore()
    scores.put(a_score(1, 3, 0, [-0.5, -0.25]))
    assert known(scores, row()) == [None, -0.5, -0.25, None, None, None]
    assert scores.missing(scores.attach(row(), DIGESTS)) == [(4, 6, 1)]
    scores.put(a_score(4, 6, 1, [-1.0, -2.0]))
    assert known(scores, row()) == [None, -0.5, -0.25, None, -1.0, -2.0]
    assert scores.missing(scores.attach(row(), DIGESTS)) == []


def test_without_scores_every_trainable_token_is_missing() -> None:
    assert ScoreStore().missing(row()) == [(1, 3, 0), (4, 6, 1)]
    assert ScoreStore().attach(row(), DIGESTS).old is None


def test_adjacent_versions_are_separate_missing_spans() -> None:
    assert ScoreStore().missing(row(versions=[-1, 0, 0, 1, 1, 2])) == [(1, 3, 0), (3, 5, 1), (5, 6, 2)]


@pytest.mark.parametrize(
    "other",
    [
        a_score(1, 3, 1, [-9.0, -9.0]),
        a_score(1, 3, 0, [-9.0, -9.0], digest="weights 1"),
        a_score(1, 3, 0, [-9.0, -9.0], tokens=[5, 6, 8]),
        a_score(1, 3, 0, [-9.0, -9.0], tokens=[4, 6, 7]),
        a_score(1, 3, 0, [-9.0, -9.0], trajectory="g000000/1"),
        a_score(1, 9, 0, [-9.0] * 8, tokens=[*TOKENS, 1, 2, 3]),
    ],
    ids=["version", "weights", "token", "prompt", "trajectory", "a longer sampling"],
)
def test_a_score_that_does_not_match_is_not_attached(other: OldLogprobsComputed) -> None:
    scores = ScoreStore()
    scores.put(other)
    assert known(scores, row()) == [None] * 6
    scores.put(a_score(1, 3, 0, [-0.5, -0.25]))
    assert known(scores, row())[1:3] == [-0.5, -0.25]


def test_tokens_after_the_span_need_not_match() -> None:
    """A flushed trajectory is scored before it is finished."""
    scores = ScoreStore()
    scores.put(a_score(1, 3, 0, [-0.5, -0.25], tokens=TOKENS[:3]))
    assert known(scores, row()) == [None, -0.5, -0.25, None, None, None]


def test_a_version_without_a_known_digest_gets_no_values() -> None:
    scores = ScoreStore()
    scores.put(a_score(1, 3, 0, [-0.5, -0.25]))
    assert scores.attach(row(), {}).old is not None
    assert np.isnan(scores.attach(row(), {}).old).all()  # type: ignore[arg-type]


def test_overlapping_scores_of_a_segment_are_merged() -> None:
    """A segment flushed halfway and finished later: each token keeps its first value."""
    scores = ScoreStore()
    of = row(versions=[-1, 0, 0, 0, 0, 0])
    scores.put(a_score(1, 3, 0, [-0.5, -0.25]))
    scores.put(a_score(1, 6, 0, [-9.0, -9.0, -1.0, -2.0, -3.0]))
    assert known(scores, of) == [None, -0.5, -0.25, -1.0, -2.0, -3.0]
    assert scores.conflicts == 0


def test_repeated_scores_are_counted_and_change_nothing() -> None:
    scores = ScoreStore()
    for _ in range(3):
        scores.put(a_score(1, 3, 0, [-0.5, -0.25]))
    assert known(scores, row())[1:3] == [-0.5, -0.25]
    assert (scores.repeats, scores.conflicts) == (2, 0)


def test_a_conflicting_value_is_counted_and_the_first_is_kept() -> None:
    scores = ScoreStore()
    scores.put(a_score(1, 3, 0, [-0.5, -np.inf]))
    scores.put(a_score(1, 3, 0, [-0.5, -np.inf]))
    scores.put(a_score(1, 3, 0, [-0.625, -np.inf]))
    assert known(scores, row())[1:3] == [-0.5, -np.inf]
    assert (scores.repeats, scores.conflicts, scores.largest_conflict) == (1, 1, 0.125)


def test_values_already_in_a_row_are_kept() -> None:
    scores = ScoreStore()
    scores.put(a_score(1, 3, 0, [-0.5, -0.25]))
    first = scores.attach(row(), DIGESTS)
    other = ScoreStore()
    other.put(a_score(1, 3, 0, [-9.0, -9.0]))
    other.put(a_score(4, 6, 1, [-1.0, -2.0]))
    assert known(other, first) == [None, -0.5, -0.25, None, -1.0, -2.0]
    assert known(scores, row())[4:] == [None, None], "rows are not changed in place"


def test_forgotten_trajectories_leave_no_scores() -> None:
    scores = ScoreStore()
    for sample in range(3):
        scores.put(a_score(1, 3, 0, [-0.5, -0.25], trajectory=f"g000000/{sample}"))
    scores.forget("g000000/1")
    scores.forget("never heard of")
    scores.retain(lambda trajectory: trajectory != "g000000/2")
    assert len(scores) == 1
    assert known(scores, row())[1] == -0.5


def test_18_10_scores_in_any_order_and_pieces_give_every_token_its_value() -> None:
    """Compared with a table by token: random segments, scored in random pieces and order, some of them twice."""
    rng = random.Random(7)
    for _ in range(200):
        length = rng.randint(4, 24)
        versions = [-1] + [rng.choice([-1, 0, 0, 1, 2, 3]) for _ in range(length - 1)]
        of = row([rng.randint(0, 9) for _ in range(length)], versions)
        truth = [-rng.random() for _ in range(length)]
        records = []
        for start, stop, version in spans(of.versions):
            cuts = sorted({start, stop, *(rng.randint(start, stop) for _ in range(rng.randint(0, 2)))})
            for begin, end in itertools.pairwise(cuts):
                values = truth[begin:end]
                records.append(a_score(begin, end, version, values, tokens=of.tokens.tolist()))
                if rng.random() < 0.3:
                    records.append(records[-1])
                if rng.random() < 0.3:
                    records.append(a_score(begin, end, version + 1, [-99.0] * len(values), tokens=of.tokens.tolist()))
        rng.shuffle(records)
        scores = ScoreStore()
        delivered = set()
        for record in records:
            if rng.random() < 0.2:
                continue  # this piece is never delivered
            scores.put(record)
            if record.digest == DIGESTS.get(record.version):
                delivered |= {t for t in range(record.start, record.stop) if versions[t] == record.version}
        expected = [np.float32(truth[t]) if t in delivered else None for t in range(length)]
        assert known(scores, of) == expected
        left = {t for start, stop, _ in scores.missing(scores.attach(of, DIGESTS)) for t in range(start, stop)}
        assert left == {t for t in range(length) if versions[t] >= 0} - delivered


def test_a_row_has_one_record_per_segment() -> None:
    values = np.arange(6, dtype=np.float32) * -1
    records = computed_of(
        row(versions=[-1, 0, 0, -1, 0, 1]), values, run="test", by="me", version=Version(0), digest="weights 0"
    )
    assert [(r.start, r.stop, r.values) for r in records] == [
        (1, 3, pack_float32([-1.0, -2.0])), (4, 5, pack_float32([-4.0])),
    ]  # fmt: skip
    assert [r.prefix for r in records] == [prefix_digest(pack_int32(TOKENS), stop) for stop in (3, 5)]
    assert records[0].prefix == prefix_digest(pack_int32(TOKENS[:3]), 3)


@pytest.mark.parametrize(
    ("record", "cause", "words"),
    [
        (a_score(1, 3, -1, [-1.0, -1.0]), RejectCause.NEGATIVE_VERSION, "versions start at 0"),
        (a_score(0, 2, 0, [-1.0, -1.0]), RejectCause.LENGTH_MISMATCH, "not a span"),
        (a_score(2, 2, 0, []), RejectCause.LENGTH_MISMATCH, "not a span"),
        (a_score(1, 3, 0, [-1.0, np.nan]), RejectCause.NOT_FINITE, "is NaN"),
        (a_score(1, 3, 0, [-1.0, 0.5]), RejectCause.OUT_OF_RANGE, "above 0"),
        (a_score(1, 3, 0, [-1.0, np.inf]), RejectCause.OUT_OF_RANGE, "above 0"),
    ],
)
def test_an_inconsistent_record_is_refused(record: OldLogprobsComputed, cause: RejectCause, words: str) -> None:
    scores = ScoreStore()
    with pytest.raises(MalformedTrajectory, match=words) as error:
        scores.put(record)
    assert error.value.cause is cause
    assert len(scores) == 0


def test_values_of_another_length_are_refused() -> None:
    record = a_score(1, 3, 0, [-1.0, -1.0])
    longer = type(record)(**{f: getattr(record, f) for f in record.__struct_fields__} | {"stop": 4})
    with pytest.raises(MalformedTrajectory, match=r"g000000/0 \[1, 4\) of version 0: 3 tokens but 8 bytes") as error:
        check_computed(longer)
    assert error.value.cause is RejectCause.LENGTH_MISMATCH
    with pytest.raises(ValueError, match=r"1 values for the 2 tokens \[1, 3\)"):
        a_score(1, 3, 0, [-1.0])


def test_values_slightly_above_0_are_accepted() -> None:
    scores = ScoreStore()
    scores.put(a_score(1, 3, 0, [5e-4, -1.0]))
    assert len(scores) == 1
