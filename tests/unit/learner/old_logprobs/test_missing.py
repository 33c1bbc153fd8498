"""Missing old log-probs: the missing policy applies, every token is counted, and substitutes are marked."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from palimpsest.common.config.proximal import MissingPolicy
from palimpsest.common.user_error import ExitCode, UserError
from palimpsest.services.learner.batch.batching import PaddedBatch, pad
from palimpsest.services.learner.old_logprobs.missing import MissingCounter, MissingReason, apply_missing_policy
from palimpsest.services.learner.old_logprobs.passes import BatchScores
from palimpsest.services.learner.proximal.types import Exact, Patched
from tests.learner_parts.models import CPU
from tests.records.builders import a_row

CURRENT = -7.0
RECOMPUTED = "surrogate:current_recompute"
BYPASSED = "surrogate:bypass"


def batches() -> list[PaddedBatch]:
    """Two micro-batches: versions 0 to 2, behavior -1, -2, ... along each row."""
    rows = [
        a_row("g0/0", [1, 2, 3, 4, 5], [-1, 0, 0, 1, 1], behavior=[0.0, -1.0, -2.0, -3.0, -4.0]),
        a_row("g0/1", [1, 2, 3], [-1, 0, 2], behavior=[0.0, -5.0, -6.0]),
    ]
    return [pad(rows), pad([a_row("g1/0", [1, 2, 3], [-1, 2, 2], behavior=[0.0, -8.0, -9.0])])]


def holes(*versions: int) -> list[NDArray[np.bool_]]:
    return [np.isin(batch.versions, versions) for batch in batches()]


def exact() -> list[Tensor]:
    """Old log-probs of -0.5 at every trainable token."""
    return [torch.from_numpy(np.where(batch.mask, np.float32(-0.5), np.float32(0))) for batch in batches()]


def apply_policy(
    missing: list[NDArray[np.bool_]],
    policy: MissingPolicy,
    *,
    why: MissingReason = MissingReason.VERSION_GONE,
    misses: MissingCounter | None = None,
) -> Exact | Patched:
    values = [value.masked_fill(torch.from_numpy(hole), CURRENT) for value, hole in zip(exact(), missing, strict=True)]
    return applied(values, missing, batches(), policy=policy, why=why, misses=misses or MissingCounter())


def applied(
    values: list[Tensor], missing: list[NDArray[np.bool_]], of: list[PaddedBatch], *, policy: MissingPolicy,
    why: MissingReason, misses: MissingCounter,
) -> Exact | Patched:  # fmt: skip
    """Apply the policy to these values, which hold the present weights' log-probs where one is missing."""
    scores = BatchScores(of, CPU, max_tokens=1000, fresh=0)
    scores.values = [
        value if policy == RECOMPUTED else value.masked_fill(torch.from_numpy(hole), 0.0)
        for value, hole in zip(values, missing, strict=True)
    ]
    return apply_missing_policy(scores, missing, of, policy=policy, why=why, misses=misses)


@pytest.mark.parametrize("policy", ["fail", "drop", BYPASSED, RECOMPUTED])
def test_18_15_nothing_is_counted_while_nothing_is_missing(policy: MissingPolicy) -> None:
    misses = MissingCounter()
    proximal = apply_policy(holes(), policy, misses=misses)
    assert isinstance(proximal, Exact)
    assert proximal.absent is None
    assert all(map(torch.equal, proximal.logprobs, exact()))
    assert not misses.tokens
    assert misses.take() == {}


@pytest.mark.parametrize("why", list(MissingReason))
@pytest.mark.parametrize("policy", ["fail", "drop", BYPASSED, RECOMPUTED])
def test_18_15_every_missing_token_is_counted_by_cause_and_policy(why: MissingReason, policy: MissingPolicy) -> None:
    misses = MissingCounter()
    for _ in range(2):
        try:
            apply_policy(holes(1, 2), policy, why=why, misses=misses)
        except UserError:
            assert policy == "fail"
    assert misses.tokens == {(why.value, policy): 10}
    assert misses.take() == {(why.value, policy): 10}
    assert misses.take() == {}


def test_dropped_tokens_are_absent_and_have_no_value() -> None:
    proximal = apply_policy(holes(1), "drop")
    assert isinstance(proximal, Exact)
    mask = torch.from_numpy(batches()[0].mask)
    anchor = proximal.anchor(0, torch.zeros(2, 5), mask)
    assert anchor.missing.tolist() == [[False, False, False, True, True], [False] * 5]
    assert anchor.exact.tolist() == [[False, True, True, False, False], [False, True, True, False, False]]
    assert anchor.logprobs.tolist() == [[0, -0.5, -0.5, 0, 0], [0, -0.5, -0.5, 0, 0]]
    whole = proximal.anchor(1, torch.zeros(1, 3), torch.from_numpy(batches()[1].mask))
    assert not whole.missing.any()
    assert whole.exact.tolist() == [[False, True, True]]


def test_bypass_uses_behavior_log_probs_and_marks_them() -> None:
    proximal = apply_policy(holes(1), BYPASSED)
    assert isinstance(proximal, Patched)
    assert proximal.method == "bypass"
    anchor = proximal.anchor(0, torch.zeros(2, 5), torch.from_numpy(batches()[0].mask))
    assert anchor.logprobs.tolist() == [[0, -0.5, -0.5, -3.0, -4.0], [0, -0.5, -0.5, 0, 0]]
    assert anchor.exact.tolist() == [[False, True, True, False, False], [False, True, True, False, False]]
    assert not anchor.missing.any()


def test_recompute_keeps_the_present_weights_log_probs_and_marks_them() -> None:
    proximal = apply_policy(holes(1), RECOMPUTED)
    assert isinstance(proximal, Patched)
    assert proximal.method == "current_recompute"
    assert [part.tolist() for part in proximal.logprobs] == [
        [[0, -0.5, -0.5, CURRENT, CURRENT], [0, -0.5, -0.5, 0, 0]], [[0, -0.5, -0.5]],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("why", "words", "code"),
    [
        (
            MissingReason.VERSION_GONE,
            "version 1 is not in the store, .* 2 tokens in 1 trajectory",
            ExitCode.DAMAGED,
        ),
        (
            MissingReason.NOT_SCORED,
            "no replica scored 2 tokens in 1 trajectory sampled by version 1",
            ExitCode.UNAVAILABLE,
        ),
        (MissingReason.TOO_LATE, "2 tokens in 1 trajectory sampled by version 1 arrived after", ExitCode.UNAVAILABLE),
    ],
)
def test_failing_names_version_trajectories_and_remedy(why: MissingReason, words: str, code: ExitCode) -> None:
    with pytest.raises(UserError, match=words) as error:
        apply_policy(holes(1), "fail", why=why)
    assert error.value.code is code
    assert 'learner.proximal.missing = "drop"' in str(error.value)


def test_failing_counts_trajectories_over_all_micro_batches() -> None:
    with pytest.raises(UserError, match=r"versions 0, 2 are not .* 6 tokens in 3 trajectories"):
        apply_policy(holes(0, 2), "fail")


def test_an_error_names_a_few_of_many_versions() -> None:
    rows = [a_row(f"g0/{v}", [1, 2], [-1, v]) for v in range(9)]
    batch = pad(rows)
    with pytest.raises(UserError, match="versions 0, 1, 2, 3, 4 and 4 more are not"):
        applied(
            [torch.zeros(9, 2)], [batch.mask], [batch], policy="fail", why=MissingReason.VERSION_GONE,
            misses=MissingCounter(),
        )  # fmt: skip


def test_18_15_random_missing_tokens_match_a_table() -> None:
    """A known token keeps its value; a missing token gets the policy's value and a mark."""
    rng = np.random.default_rng(3)
    for draw in range(200):
        rows = [
            a_row(
                f"g0/{i}", [1] * length, [-1, *rng.integers(-1, 4, length - 1)], behavior=list(-rng.random(length) - 1)
            )
            for i, length in enumerate(rng.integers(2, 8, 3))
        ]
        batch = pad(rows)
        hole = batch.mask & (rng.random(batch.mask.shape) < 0.3)
        old = np.where(batch.mask & ~hole, -rng.random(batch.mask.shape), 0).astype(np.float32)
        policy: MissingPolicy = ("drop", BYPASSED, RECOMPUTED)[draw % 3]  # type: ignore[assignment]
        misses = MissingCounter()
        filled = np.where(hole, np.float32(CURRENT), old)
        proximal = applied(
            [torch.from_numpy(filled)], [hole], [batch], policy=policy, why=MissingReason.NOT_SCORED, misses=misses
        )
        anchor = proximal.anchor(0, torch.zeros(batch.mask.shape), torch.from_numpy(batch.mask))
        stand_in = {"drop": 0.0 * old, BYPASSED: batch.behavior, RECOMPUTED: np.full_like(old, CURRENT)}[policy]
        assert np.array_equal(anchor.logprobs.numpy(), np.where(hole, stand_in, old))
        assert np.array_equal(anchor.missing.numpy(), hole & (policy == "drop"))
        assert np.array_equal(anchor.exact.numpy(), batch.mask & ~hole)
        assert sum(misses.tokens.values()) == hole.sum()
