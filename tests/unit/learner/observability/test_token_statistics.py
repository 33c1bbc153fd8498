"""Statistics of a batch's tokens."""

import math

import numpy as np
import pytest

from palimpsest.services.learner.observability.token_statistics import (
    LogRatios,
    Tokens,
    by_staleness,
    divergences,
    effective_sample_share,
    summary,
)
from tests.oracles import batch as oracle

DRAWS = 200


def some_tokens(**changes: list[float]) -> Tokens:
    values = {
        "staleness": [0, 0, 2, 2],
        "behavior": [-1.0, -1.0, -2.0, -2.0],
        "proximal": [-1.1, -0.9, -2.0, -1.8],
        "current": [-1.1, -0.9, -1.5, -1.9],
        "old": [-1.1, -0.9, -2.0, -1.8],
        "entropy": [0.5, 0.7, 0.1, 0.3],
        "advantages": [1.0, 1.0, -1.0, -1.0],
        "masked": [False, True, False, False],
        "clipped": [False, False, True, False],
        **changes,
    }
    return Tokens(**{name: np.array(value) for name, value in values.items()})


def test_means_are_computed_per_staleness() -> None:
    got = by_staleness(some_tokens())
    assert sorted(got) == [0, 2]
    assert got[0]["log_discrepancy"] == pytest.approx(0.0)
    assert got[0]["log_discrepancy_abs"] == pytest.approx(0.1)
    assert got[0]["log_staleness_ratio_abs"] == pytest.approx(0.0)
    assert got[0]["masked"] == 0.5
    assert got[2]["log_discrepancy"] == pytest.approx(0.1)
    assert got[2]["log_staleness_ratio"] == pytest.approx(0.2)
    assert got[2]["log_staleness_ratio_abs"] == pytest.approx(0.3)
    assert got[2]["clipped"] == 0.5
    assert got[2]["log_total_ratio_abs"] == pytest.approx((0.5 + 0.1) / 2)


def test_tokens_that_are_not_finite_are_counted_and_left_out() -> None:
    got = summary(some_tokens(proximal=[-1.1, float("nan"), float("-inf"), -1.8]))
    assert got["nonfinite"] == 2
    assert got["log_discrepancy_abs"] == pytest.approx((0.1 + 0.2) / 2)


def test_k3_of_the_discrepancy() -> None:
    """algorithms.md, section 9: lr = .1 gives .00517, lr = -.5 gives .10653."""
    got = summary(some_tokens(behavior=[-1.2, -1.2, -1.3, -1.3], proximal=[-1.1, -1.1, -1.8, -1.8]))
    assert got["discrepancy_k3"] == pytest.approx((0.00517 + 0.10653) / 2, abs=1e-5)


def test_effective_sample_share() -> None:
    """algorithms.md, example C: weights 1, 1, 1, 5 give ESS/N = .5714; scale does not matter."""
    for shift in (0.0, 300.0):
        tokens = some_tokens(behavior=[-1.0] * 4, current=[shift - 1.0] * 3 + [shift - 1.0 + float(np.log(5))])
        assert effective_sample_share(tokens) == pytest.approx(64 / 28 / 4)
    assert effective_sample_share(some_tokens(behavior=[-1.0] * 4, current=[-1.0] * 4)) == 1.0


def test_divergences_equal_a_count_per_token() -> None:
    for seed in range(DRAWS):
        generator = np.random.default_rng(seed)
        count = int(generator.integers(4, 60))
        behavior = -generator.exponential(1.0, count)
        proximal = np.where(generator.random(count) < 0.3, behavior, behavior + generator.normal(0, 0.3, count))
        proximal = np.minimum(proximal, 0.0)
        current = np.minimum(proximal + generator.normal(0, 0.2, count), 0.0)
        got = divergences(plain(behavior=behavior, proximal=proximal, current=current))
        expected = oracle.divergences(list(proximal), list(behavior), list(current))
        assert got == pytest.approx(expected, rel=1e-9, abs=1e-12), f"seed {seed}"


def test_divergences_leave_out_tokens_without_a_ratio() -> None:
    behavior, proximal = np.array([-1.0, -0.5, -2.0, -3.0]), np.array([-1.1, -0.4, 0.0, float("nan")])
    tokens = plain(behavior=behavior, proximal=proximal, current=np.array([-1.0, -0.5, -2.0, -3.0]))
    tokens.causes["missing"] = np.array([False, False, True, False])
    got = divergences(tokens)
    assert got["difference_max"] == pytest.approx(
        max(abs(math.exp(-1.1) - math.exp(-1.0)), math.exp(-0.4) - math.exp(-0.5))
    )
    assert got["unsure"] == 2


def test_certain_tokens_do_not_count_as_same() -> None:
    behavior = np.array([0.0, -1e-5, -0.5, -0.5])
    got = divergences(plain(behavior=behavior, proximal=np.array([0.0, -1e-5, -0.5, -0.6]), current=behavior))
    assert (got["unsure"], got["same"]) == (2.0, 0.5)
    assert math.isnan(divergences(plain(behavior=behavior[:2], proximal=behavior[:2], current=behavior[:2]))["same"])


def test_18_1_the_log_ratios_add_up_to_the_total() -> None:
    for seed in range(DRAWS):
        generator = np.random.default_rng(seed)
        behavior, proximal, current = -generator.exponential(2.0, (3, 20)).astype(np.float32)
        ratios = LogRatios.of(plain(behavior=behavior, proximal=proximal, current=current))
        np.testing.assert_allclose(ratios.total, current.astype(np.float64) - behavior, atol=1e-6)


def test_18_8_means_leave_out_nonfinite_entropies() -> None:
    assert summary(some_tokens(entropy=[0.5, float("nan"), 0.1, 0.3]))["entropy"] == pytest.approx(0.3)


def plain(*, behavior: np.ndarray, proximal: np.ndarray, current: np.ndarray) -> Tokens:
    """Tokens with log-probs only."""
    zeros, no = np.zeros(len(behavior)), np.zeros(len(behavior), dtype=bool)
    return Tokens(
        staleness=zeros.astype(np.int32),
        behavior=behavior,
        proximal=proximal,
        current=current,
        old=np.full(len(behavior), np.nan),
        entropy=zeros,
        advantages=zeros,
        masked=no,
        clipped=no,
    )
