"""Sums over minibatches and ranks, checked by hand."""

import math

import pytest
import torch

from palimpsest.services.learner.training.accumulators import StepAccumulator, TokenTotals


def test_only_usable_tokens_are_added() -> None:
    sums = StepAccumulator()
    deviations = torch.tensor([[1.0, 4.0], [float("nan"), 9.0]])
    sums.add_pass(torch.tensor(0.5), deviations, torch.tensor([[True, True], [False, False]]))
    sums.add_pass(torch.tensor(0.25), deviations, torch.tensor([[False, False], [False, True]]))
    assert (sums.loss, sums.squared_deviation, sums.usable) == (0.75, 14.0, 3)


def test_a_nonfinite_norm_counts_as_a_skipped_step() -> None:
    sums = StepAccumulator(norms=[1.0, math.inf, math.nan, 3.0], normalizers=[1.0, 2.0], baselines=[0.5, 1.0])
    assert (sums.grad_norm, sums.skipped, sums.normalizer, sums.baseline) == (3.0, 2, 1.5, 0.75)
    nothing = StepAccumulator(norms=[math.nan])
    assert math.isnan(nothing.grad_norm)
    assert (nothing.skipped, nothing.baseline) == (1, None)


def test_totals_are_summed_over_ranks_and_shares_follow_from_totals() -> None:
    one = TokenTotals(tokens=6, active=3, staleness=4, squared_deviation=1.0, usable=3, entropy=2.0, trajectories=2)
    both = TokenTotals.summed([one, TokenTotals(tokens=2, active=1, staleness=4, usable=1)])
    assert both == TokenTotals(8, 4, 8, 1.0, 4, 2.0, 2)
    assert (both.active_share, both.mean_staleness) == (0.5, 1.0)
    assert (both.mean_squared_deviation, both.mean_entropy) == (0.25, pytest.approx(1.0))


def test_without_tokens_there_are_no_means() -> None:
    nothing = TokenTotals.summed([TokenTotals(), TokenTotals()])
    assert nothing.mean_entropy is None
    assert all(map(math.isnan, (nothing.active_share, nothing.mean_staleness, nothing.mean_squared_deviation)))
