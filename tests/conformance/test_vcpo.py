"""Effective sample size, learning-rate factor, minimum-variance baseline (algorithms.md 11, 18.13, 18.14)."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import Tensor

from palimpsest.services.learner.distributed import ProcessGroup
from palimpsest.services.learner.losses.vcpo import (
    POWERS,
    ess,
    lr_factor,
    minimum_variance_baseline,
    subtract_baseline,
    trajectory_log_ratio,
)
from palimpsest.services.learner.training.min_variance_baseline import MinimumVarianceBaseline
from tests.oracles import vcpo as oracle
from tests.processes.waiting import LIMIT_S

CASES = 200


def alone(value: tuple[float, ...]) -> list[tuple[float, ...]]:
    return [value]


def over_ranks(parts: list[Tensor]) -> list[float | Exception]:
    """Result of `ess` on each rank: one thread per rank, with its part of the log-weights."""
    barrier = threading.Barrier(len(parts), timeout=LIMIT_S)
    boxes: list[tuple[float, ...]] = [()] * len(parts)

    def gather_of(rank: int) -> Callable[[tuple[float, ...]], list[tuple[float, ...]]]:
        def gather(value: tuple[float, ...]) -> list[tuple[float, ...]]:
            boxes[rank] = value
            barrier.wait()
            values = list(boxes)
            barrier.wait()
            return values

        return gather

    def run(rank: int) -> float | Exception:
        try:
            return ess(parts[rank], gather=gather_of(rank))
        except ValueError as error:
            return error

    with ThreadPoolExecutor(len(parts)) as pool:
        return list(pool.map(run, range(len(parts))))


@pytest.mark.parametrize(
    ("weights", "share", "sqrt"),
    [((1.0, 1.0, 1.0, 5.0), 0.5714, 0.7559), ((1.0, 1.0, 1.0, 2.0), 0.893, 0.945)],
)
def test_18_13_example_c(weights: tuple[float, ...], share: float, sqrt: float) -> None:
    """The second case is the first truncated at 2."""
    found = ess(torch.tensor(weights).log(), gather=alone)
    assert found == pytest.approx(share, abs=5e-4 if share > 0.6 else 5e-5)
    assert lr_factor(found, 1.0, POWERS["sqrt"]) == pytest.approx(sqrt, abs=5e-4 if share > 0.6 else 5e-5)
    assert lr_factor(found, 1.0, POWERS["linear"]) == found


def test_18_13_effective_samples_equal_the_oracle_on_any_number_of_ranks() -> None:
    for seed in range(CASES):
        generator = np.random.default_rng(seed)
        log_weights = generator.normal(0, 1.5, int(generator.integers(1, 12)))
        expected = oracle.ess_share(np.exp(log_weights))
        assert ess(torch.tensor(log_weights), gather=alone) == pytest.approx(expected, rel=1e-9)
        if seed % 10 == 0:
            cut = int(generator.integers(0, len(log_weights) + 1))  # maybe one rank has none
            parts = [torch.tensor(log_weights[:cut]), torch.tensor(log_weights[cut:])]
            assert over_ranks(parts) == [pytest.approx(expected, rel=1e-9)] * 2


@pytest.mark.parametrize("shift", [-3000.0, -50.0, 50.0, 3000.0])
def test_18_13_effective_samples_do_not_depend_on_scale(shift: float) -> None:
    log_weights = torch.tensor([0.0, 0.0, 0.0, np.log(5.0)], dtype=torch.float64)
    assert ess(log_weights + shift, gather=alone) == pytest.approx(64 / 28 / 4, rel=1e-9)


def test_18_13_all_ranks_subtract_the_same_maximum() -> None:
    """If each rank subtracted its own maximum, the result would be 0.5, not 0.25."""
    parts = [torch.zeros(2, dtype=torch.float64), torch.full((2,), 3000.0, dtype=torch.float64)]
    assert over_ranks(parts) == [pytest.approx(0.5, rel=1e-9)] * 2  # two of four trajectories count
    parts = [torch.zeros(2, dtype=torch.float64), torch.tensor([3000.0, 0.0], dtype=torch.float64)]
    assert over_ranks(parts) == [pytest.approx(0.25, rel=1e-9)] * 2


@pytest.mark.parametrize("count", [1, 2, 7])
def test_equal_weights_have_a_share_of_1(count: int) -> None:
    assert ess(torch.full((count,), -4.0), gather=alone) == pytest.approx(1.0, rel=1e-12)


def test_the_share_of_no_trajectories_is_1() -> None:
    assert ess(torch.zeros(0), gather=alone) == 1.0
    assert over_ranks([torch.zeros(0), torch.zeros(0)]) == [1.0, 1.0]


def test_a_log_weight_that_is_not_finite_is_refused_on_every_rank() -> None:
    """Otherwise the other ranks would wait for the rank that raised."""
    refused = over_ranks([torch.tensor([0.0, float("nan")]), torch.zeros(3)])
    assert all(isinstance(answer, ValueError) for answer in refused)


def test_the_weight_of_a_trajectory_is_the_product_of_its_total_ratios() -> None:
    current = torch.tensor([[-1.0, -2.0, float("nan"), 5.0], [-1.0, -1.0, -100.0, -1.0]])
    behavior = torch.tensor([[-1.5, -2.25, -1.0, -9.0], [-1.0, -1.0, -1.0, float("-inf")]])
    mask = torch.tensor([[True, True, True, False], [True, True, True, True]])
    found = trajectory_log_ratio(current.requires_grad_(), behavior, mask)
    assert not found.requires_grad
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx([0.75, -99.0])


def test_the_factor_equals_the_oracle_and_is_never_above_one() -> None:
    for seed in range(CASES):
        share, base, power = np.random.default_rng(seed).uniform(0.01, 1, 3)
        assert lr_factor(share, base, power) == pytest.approx(oracle.factor(share, base, power), rel=1e-12)
        assert lr_factor(share, base, power) <= 1


def test_a_base_of_zero_gives_a_factor_of_1() -> None:
    assert lr_factor(0.01, 0.0, 0.5) == 1.0


@pytest.mark.parametrize(("share", "power"), [(1.2, 0.5), (-0.1, 0.5), (float("nan"), 0.5), (0.5, 0.0)])
def test_a_share_or_power_out_of_range_is_refused(share: float, power: float) -> None:
    with pytest.raises(ValueError, match="effective sample share"):
        lr_factor(share, 1.0, power)


def test_the_worked_example_of_the_baseline() -> None:
    """5/7; the mean reward is 2/3. With the weight counted twice it would be 17/19 = 0.895."""
    weights, norms, rewards = (1.0, 1.0, 2.0), (1.0, 2.0, 1.0), (1.0, 0.0, 1.0)
    assert minimum_variance_baseline(weights, norms, rewards) == pytest.approx(5 / 7, rel=1e-12)
    assert minimum_variance_baseline((1, 1, 1), (1.0, 2.0, 4.0), rewards) == pytest.approx(5 / 7, rel=1e-12)
    twice = minimum_variance_baseline(weights, (1.0, 2.0, 4.0), rewards)
    assert twice == pytest.approx(0.895, abs=5e-4)


def test_the_baseline_equals_the_oracle_at_any_scale_of_the_weights() -> None:
    for seed in range(CASES):
        generator = np.random.default_rng(seed)
        count = int(generator.integers(1, 10))
        weights, norms, rewards = (
            np.exp(generator.normal(0, 1, count)),
            generator.random(count),
            generator.random(count),
        )
        expected = oracle.baseline(weights, norms, rewards)
        for scale in (1.0, 1e-200, 1e200):
            assert minimum_variance_baseline(weights * scale, norms, rewards) == pytest.approx(expected, rel=1e-9)


def scores(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights, gradients of the log-prob and rewards of all answers of a policy, sampled uniformly.

    So w = pi K, and the mean of w g is exactly zero: a baseline changes the variance of the estimate, not its mean.
    """
    generator = np.random.default_rng(seed)
    count = int(generator.integers(3, 9))
    policy = np.exp(generator.normal(0, 1, count))
    policy /= policy.sum()
    return policy * count, np.eye(count) - policy, generator.normal(0, 1, count)


def test_18_14_any_other_baseline_has_more_variance() -> None:
    for seed in range(CASES):
        weights, gradients, rewards = scores(seed)
        norms = (gradients**2).sum(1)
        best = minimum_variance_baseline(weights, norms, rewards)
        least = oracle.variance(weights, gradients, rewards, best)
        for shift in (-1.0, -0.1, -1e-3, 1e-3, 0.1, 1.0):
            assert oracle.variance(weights, gradients, rewards, best + shift) > least, f"seed {seed}, {shift}"
        for other in (0.0, float(rewards.mean()), oracle.baseline(weights**2, norms, rewards)):
            assert oracle.variance(weights, gradients, rewards, other) >= least


def test_18_14_the_baseline_does_not_change_the_mean_gradient() -> None:
    weights, gradients, rewards = scores(4)
    with_it = oracle.estimator(weights, gradients, rewards, 0.7).mean(0)
    np.testing.assert_allclose(with_it, oracle.estimator(weights, gradients, rewards, 0.0).mean(0), atol=1e-12)


def test_subtract_baseline_gives_the_gradient_from_two_sums() -> None:
    weights, gradients, rewards = scores(9)
    weighted = [torch.tensor((weights * rewards) @ gradients), torch.tensor([[2.0]])]
    subtract_baseline(weighted, [torch.tensor(weights @ gradients), torch.tensor([[4.0]])], 0.25)
    np.testing.assert_allclose(weighted[0], oracle.estimator(weights, gradients, rewards, 0.25).sum(0), atol=1e-12)
    assert float(weighted[1]) == 1.0


class Measured:
    """A model with one parameter and a gradient that the test sets."""

    def __init__(self) -> None:
        self.gradient = torch.zeros(2)

    def gradients(self) -> list[Tensor]:
        return [self.gradient]

    def squared_norm(self) -> float:
        return float(self.gradient.double().square().sum())


def settled(gradients: list[list[float]], rewards: list[float]) -> tuple[float, Tensor]:
    """Baseline and gradient for trajectories with these gradients, which include the weights."""
    model = Measured()
    least = MinimumVarianceBaseline(model, ProcessGroup())  # type: ignore[arg-type]
    for gradient, reward in zip(gradients, rewards, strict=True):
        model.gradient.copy_(torch.tensor(gradient))
        least.add(reward)
        assert not model.gradient.any()
    baseline = least.end_group()
    least.settle()
    return baseline, model.gradient


def test_each_group_has_its_own_baseline() -> None:
    """An easy and a hard task: two baselines, and a smaller variance than with one baseline for the minibatch."""
    generator = np.random.default_rng(0)
    rewards = [(generator.random(64) < p).astype(float) for p in (0.05, 0.95)]
    gradients = [generator.normal(0, 1, (64, 2)) for _ in rewards]
    model = Measured()
    least = MinimumVarianceBaseline(model, ProcessGroup())  # type: ignore[arg-type]
    expected, apart, common = np.zeros(2), 0.0, 0.0
    norms = [(g**2).sum(1) for g in gradients]
    of_all = oracle.baseline(np.ones(128), np.concatenate(norms), np.concatenate(rewards))
    for group_gradients, group_rewards, group_norms in zip(gradients, rewards, norms, strict=True):
        for gradient, reward in zip(group_gradients, group_rewards, strict=True):
            model.gradient.copy_(torch.tensor(gradient))
            least.add(float(reward))
        best = oracle.baseline(np.ones(64), group_norms, group_rewards)
        assert least.end_group() == pytest.approx(best, rel=1e-5)
        expected += oracle.estimator(np.ones(64), group_gradients, group_rewards, best).sum(0)
        apart += oracle.variance(np.ones(64), group_gradients, group_rewards, best)
        common += oracle.variance(np.ones(64), group_gradients, group_rewards, of_all)
    least.settle()
    assert model.gradient.tolist() == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-4)
    assert apart < common / 3


def test_measured_gradients_give_the_baseline_of_the_worked_example() -> None:
    """Weights 1, 1, 2 and squared norms 1, 2, 1: the gradient is the sum of w (R - 5/7) g."""
    baseline, gradient = settled([[1.0, 0.0], [1.0, 1.0], [0.0, 2.0]], [1.0, 0.0, 1.0])
    assert baseline == pytest.approx(5 / 7, rel=1e-12)
    assert gradient.tolist() == pytest.approx([2 / 7 - 5 / 7, 4 / 7 - 5 / 7], abs=1e-6)


@pytest.mark.parametrize("others", [[], [1.0]])
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_18_8_a_nonfinite_gradient_stays_nonfinite_so_that_the_step_is_skipped(
    broken: float, others: list[float]
) -> None:
    """Also if it is the only one: zeros would cause a step by momentum alone."""
    baseline, gradient = settled([[broken, 1.0], *([other, 0.0] for other in others)], [0.5, *([1.0] * len(others))])
    assert baseline == (1.0 if others else 0.0)
    assert not torch.isfinite(gradient).all()


def test_without_any_gradient_the_baseline_is_the_mean_reward() -> None:
    assert minimum_variance_baseline((1.0, 2.0), (0.0, 0.0), (1.0, 2.0)) == 1.5
    assert minimum_variance_baseline((0.0, 0.0), (1.0, 1.0), (1.0, 2.0)) == 1.5


@pytest.mark.parametrize(
    ("norms", "rewards", "message"),
    [((1.0,), (1.0, 2.0), "2 weights, 1 norms"), ((1.0, float("inf")), (1.0, 2.0), "not finite")],
)
def test_a_baseline_refuses_invalid_norms(norms: tuple[float, ...], rewards: tuple[float, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        minimum_variance_baseline((1.0, 1.0), norms, rewards)
