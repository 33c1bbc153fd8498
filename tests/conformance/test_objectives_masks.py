"""Untrainable, nonfinite and removed tokens in every objective (algorithms.md 18.7, 18.8, 18.12), and OPSM."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from palimpsest.services.learner.losses.opsm import opsm_mask
from palimpsest.services.learner.losses.ppo_clip import ppo_loss
from palimpsest.services.learner.losses.types import Inputs, Outcome
from tests.learner_parts.objectives import CASES, PAIRS, draw, gradient, inputs_of
from tests.oracles import objectives as oracle

GARBAGE = (1e6, -1e6, float("nan"), float("inf"), float("-inf"))


def with_garbage_off_the_mask(data: oracle.Data, generator: np.random.Generator) -> oracle.Data:
    def garbled(values: np.ndarray) -> np.ndarray:
        return np.where(data.mask, values, generator.choice(GARBAGE, values.shape))

    names = ("current", "proximal", "behavior", "weight", "advantages")
    return replace(data, **{name: garbled(getattr(data, name)) for name in names})


@pytest.mark.parametrize("name", PAIRS)
def test_18_7_garbage_at_untrainable_tokens_changes_no_bit(name: str) -> None:
    ours, _ = PAIRS[name]
    for seed in range(CASES):
        data = draw(seed)
        inputs, garbled = inputs_of(data), inputs_of(with_garbage_off_the_mask(data, np.random.default_rng(seed)))
        plain, other = ours(inputs), ours(garbled)
        assert torch.equal(plain.losses, other.losses), f"seed {seed}"
        assert torch.equal(plain.log_update, other.log_update), f"seed {seed}"
        assert torch.equal(gradient(plain, inputs), gradient(other, garbled)), f"seed {seed}"
        for cause, where in plain.clipped.items():
            assert torch.equal(where, other.clipped[cause]), f"seed {seed}, {cause}"
            assert not (where & ~inputs.mask).any()


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("where", ["current", "proximal", "behavior"])
@pytest.mark.parametrize("what", [float("nan"), float("inf"), float("-inf")])
def test_18_8_a_token_without_a_finite_log_prob_is_dropped(name: str, where: str, what: float) -> None:
    """It has neither loss nor gradient, and the others have the same values as without it."""
    ours, _ = PAIRS[name]
    data = draw(11)
    data.mask[0, 0] = True
    getattr(data, where)[0, 0] = what
    inputs = inputs_of(data)
    outcome = ours(inputs)
    found = gradient(outcome, inputs)
    assert torch.isfinite(outcome.losses).all()
    assert torch.isfinite(found).all()
    assert float(outcome.losses[0, 0].detach()) == 0.0
    assert float(found[0, 0]) == 0.0
    data.mask[0, 0] = False
    without = inputs_of(data)
    assert torch.equal(outcome.losses, ours(without).losses)
    assert torch.equal(found, gradient(ours(without), without))


@pytest.mark.parametrize("name", PAIRS)
def test_18_8_the_loss_is_zero_without_finite_log_probs(name: str) -> None:
    ours, _ = PAIRS[name]
    data = draw(3)
    data.current[:] = np.nan
    inputs = inputs_of(data)
    outcome = ours(inputs)
    assert (outcome.losses == 0).all()
    assert (gradient(outcome, inputs) == 0).all()


@pytest.mark.parametrize("name", PAIRS)
def test_18_12_removing_half_of_equal_tokens_halves_the_gradient(name: str) -> None:
    """The other tokens keep their gradients: the denominator does not depend on removals."""
    ours, _ = PAIRS[name]
    ones = torch.ones(2, 4, dtype=torch.float64)
    removed = torch.tensor([[True, False] * 2] * 2)

    def inputs() -> Inputs:
        current = (-0.95 * ones).requires_grad_()
        return Inputs(current, -1.0 * ones, -1.1 * ones, 0.9 * ones, 0.7 * ones, ones.bool())

    whole, half = inputs(), inputs()
    all_of_it, half_of_it = gradient(ours(whole), whole), gradient(ours(half.without(removed)), half)
    assert float(all_of_it.abs().sum()) > 0
    assert float(half_of_it.sum()) == pytest.approx(float(all_of_it.sum()) / 2, rel=1e-12)
    torch.testing.assert_close(half_of_it[~removed], all_of_it[~removed])
    assert (half_of_it[removed] == 0).all()


@pytest.mark.parametrize("threshold", [0.0, 0.05, 0.3])
def test_opsm_equals_the_oracle(threshold: float) -> None:
    seen = 0
    for seed in range(CASES):
        data = draw(seed)
        inputs = inputs_of(data)
        removed = opsm_mask(inputs, threshold=threshold)
        assert not removed.requires_grad
        assert removed.dtype == torch.bool
        np.testing.assert_array_equal(removed, oracle.opsm(data, threshold=threshold), err_msg=f"seed {seed}")
        seen += int(removed.sum())
    assert seen > 0


def two_trajectories(advantage: float) -> Inputs:
    """The first is 0.2 nats a token less likely under the current policy, the second 0.2 nats more likely."""
    current = torch.tensor([[-1.1, -1.3, -9.0], [-0.8, -0.8, -0.8]], dtype=torch.float64)
    flat = torch.full_like(current, -1.0)
    ones = torch.ones_like(current)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    return Inputs(current.requires_grad_(), flat, flat, ones, advantage * ones, mask)


def test_opsm_removes_a_failed_trajectory_that_became_less_likely() -> None:
    inputs = two_trajectories(-1.0)
    left = [[True, True, False], [False, False, False]]
    assert opsm_mask(inputs, threshold=0.19).tolist() == left
    assert not opsm_mask(inputs, threshold=0.21).any()
    assert not opsm_mask(two_trajectories(1.0), threshold=0.19).any()


@pytest.mark.parametrize("name", PAIRS)
def test_opsm_works_with_every_objective(name: str) -> None:
    """Removed tokens have no loss, the other trajectory keeps its loss, and the outcome records the cause."""
    ours, _ = PAIRS[name]
    inputs = two_trajectories(-1.0)
    removed = opsm_mask(inputs, threshold=0.19)
    plain: Outcome = ours(inputs)
    outcome = ours(inputs.without(removed)).and_also(opsm=removed)
    assert (outcome.losses[0] == 0).all()
    assert torch.equal(outcome.losses[1], plain.losses[1])
    assert outcome.clipped.keys() == {*plain.clipped, "opsm"}
    assert outcome.touched[0].tolist() == [True, True, False]
    assert (gradient(outcome, inputs)[0] == 0).all()


def test_opsm_compares_with_the_log_probs_of_the_sampler() -> None:
    """DeepSeek-V3.2: the mean is over log mu / pi_theta, whatever the proximal is."""
    inputs = two_trajectories(-1.0)
    from_sampler = replace(inputs, behavior=inputs.behavior - 1.0)  # 0.8 nats a token more likely now
    assert not opsm_mask(from_sampler, threshold=0.19).any()
    from_proximal = replace(inputs, proximal=inputs.proximal - 1.0)
    assert opsm_mask(from_proximal, threshold=0.19)[0].tolist() == [True, True, False]


def test_opsm_removes_only_tokens_with_a_negative_advantage() -> None:
    inputs = two_trajectories(-1.0)
    inputs.advantages[0, 1] = 0.5
    assert opsm_mask(inputs, threshold=0.1).tolist() == [[True, False, False], [False, False, False]]


def test_a_negative_threshold_of_opsm_is_refused() -> None:
    with pytest.raises(ValueError, match=r"OPSM threshold is -0\.1"):
        opsm_mask(two_trajectories(-1.0), threshold=-0.1)


def test_without_does_not_change_its_inputs() -> None:
    inputs = two_trajectories(-1.0)
    smaller = inputs.without(inputs.mask)
    assert not smaller.usable.any()
    assert torch.equal(smaller.mask, inputs.mask)
    assert (ppo_loss(inputs, clip_low=0.5, clip_high=0.5).losses[inputs.mask] != 0).all()
