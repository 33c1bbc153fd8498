"""What is reported of a batch's tokens."""

import numpy as np
import pytest

from services.learner.statistics import Tokens, by_staleness, effective_sample_share, summary


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


def test_means_are_kept_apart_by_staleness() -> None:
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
