"""R2VPO's variance penalty (algorithms.md 12, 18.14); test_objectives.py compares it with the oracle."""

import numpy as np
import pytest
import torch

from palimpsest.services.learner.losses.policy_gradient import policy_gradient_loss
from palimpsest.services.learner.losses.r2vpo import next_multiplier, r2vpo_loss, squared_deviation
from tests.learner_parts.objectives import CASES, draw, gradient, inputs_of, one


def loss_at(data: np.ndarray, seed: int, multiplier: float) -> float:
    drawn = draw(seed)
    drawn.current = data
    return float(r2vpo_loss(inputs_of(drawn), multiplier=multiplier, target=0.02).losses.detach().sum())


def test_18_14_the_gradient_equals_finite_differences() -> None:
    step = 1e-6
    for seed in range(CASES):
        data = draw(seed)
        inputs = inputs_of(data)
        analytic = gradient(r2vpo_loss(inputs, multiplier=0.8, target=0.02), inputs).numpy()
        for index in np.argwhere(inputs.usable.numpy())[:3]:
            up, down = data.current.copy(), data.current.copy()
            up[tuple(index)] += step
            down[tuple(index)] -= step
            difference = (loss_at(up, seed, 0.8) - loss_at(down, seed, 0.8)) / (2 * step)
            assert analytic[tuple(index)] == pytest.approx(difference, rel=1e-5, abs=1e-7), f"seed {seed}"


def test_18_14_with_a_multiplier_of_0_the_loss_is_the_unclipped_policy_gradient() -> None:
    for seed in range(CASES):
        inputs = inputs_of(draw(seed))
        ours, plain = r2vpo_loss(inputs, multiplier=0.0, target=0.02), policy_gradient_loss(inputs)
        torch.testing.assert_close(ours.losses, plain.losses)
        torch.testing.assert_close(gradient(ours, inputs), gradient(plain, inputs))


def test_18_14_the_penalty_has_no_gradient_at_a_ratio_of_one() -> None:
    inputs = one(0.0, 0.0)
    outcome = r2vpo_loss(inputs, multiplier=3.0, target=0.02)
    assert float(gradient(outcome, inputs)) == 0.0
    assert float(outcome.losses.detach()) == pytest.approx(-3.0 * 0.02)


def test_the_multiplier_scales_the_gradient() -> None:
    """r = 1.5, A = 1: 1.5 (1 - lambda) is 0.75 at lambda = 0.5, 0 at 1 and -1.5 at 2."""
    for multiplier, weight in ((0.5, 0.75), (1.0, 0.0), (2.0, -1.5)):
        inputs = one(float(np.log(1.5)), 1.0)
        outcome = r2vpo_loss(inputs, multiplier=multiplier, target=0.02)
        assert float(gradient(outcome, inputs)) == pytest.approx(-weight, abs=1e-12)


def test_the_target_does_not_change_the_gradient() -> None:
    inputs = inputs_of(draw(5))
    few, many = (r2vpo_loss(inputs, multiplier=0.8, target=target) for target in (0.01, 5.0))
    assert torch.equal(gradient(few, inputs), gradient(many, inputs))
    assert not torch.equal(few.losses, many.losses)


def test_squared_deviation_is_the_squared_distance_of_the_ratio_from_1() -> None:
    inputs = one(float(np.log(1.5)), 1.0)
    assert float(squared_deviation(r2vpo_loss(inputs, multiplier=1.0, target=0.02).log_update)) == pytest.approx(0.25)


def test_18_14_the_multiplier_follows_the_mean_square_and_is_never_negative() -> None:
    assert next_multiplier(1.0, mean_square=0.05, target=0.02, rate=10.0) == pytest.approx(1.3)
    assert next_multiplier(1.0, mean_square=0.01, target=0.02, rate=10.0) == pytest.approx(0.9)
    assert next_multiplier(1.0, mean_square=0.05, target=0.02, rate=0.0) == 1.0
    generator = np.random.default_rng(0)
    multiplier = 0.1
    for _ in range(CASES):
        multiplier = next_multiplier(multiplier, generator.exponential(0.02), target=0.02, rate=10.0)
        assert multiplier >= 0
    assert next_multiplier(0.1, mean_square=0.0, target=0.02, rate=10.0) == 0.0


@pytest.mark.parametrize("mean_square", [float("nan"), float("inf")])
def test_a_nonfinite_mean_square_does_not_change_the_multiplier(mean_square: float) -> None:
    assert next_multiplier(0.7, mean_square, target=0.02, rate=10.0) == 0.7


def test_a_negative_multiplier_is_refused() -> None:
    with pytest.raises(ValueError, match=r"R2VPO multiplier is -1\.0"):
        r2vpo_loss(one(0.1, 1.0), multiplier=-1.0, target=0.02)
