"""Every objective compared with a float64 oracle, and the numbers of algorithms.md 2, 5, 7 and 14."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from palimpsest.services.learner.corrections import Limits, Rules, correct
from palimpsest.services.learner.losses.cispo import cispo_loss
from palimpsest.services.learner.losses.gspo import gspo_loss
from palimpsest.services.learner.losses.minirl import minirl_loss
from palimpsest.services.learner.losses.policy_gradient import policy_gradient_loss
from palimpsest.services.learner.losses.ppo_clip import ppo_loss
from palimpsest.services.learner.losses.r2vpo import r2vpo_loss
from palimpsest.services.learner.losses.types import Inputs, Outcome
from tests.learner_parts.objectives import CASES, OFF, PAIRS, Ours, draw, gradient, inputs_of, one
from tests.oracles import objectives as oracle


@pytest.mark.parametrize("name", PAIRS)
def test_losses_and_gradient_equal_the_oracle(name: str) -> None:
    ours, theirs = PAIRS[name]
    for seed in range(CASES):
        data = draw(seed)
        inputs = inputs_of(data)
        outcome = ours(inputs)
        losses, slopes = theirs(data)
        np.testing.assert_allclose(outcome.losses.detach(), losses, rtol=1e-9, atol=1e-12, err_msg=f"seed {seed}")
        found = gradient(outcome, inputs)
        np.testing.assert_allclose(found, slopes, rtol=1e-9, atol=1e-12, err_msg=f"seed {seed}")


@pytest.mark.parametrize("name", PAIRS)
def test_no_gradient_passes_through_a_proximal_that_depends_on_the_current_log_probs(name: str) -> None:
    ours, _ = PAIRS[name]
    inputs = inputs_of(draw(4))
    between = 0.5 * (inputs.behavior + inputs.current)
    apart, made = replace(inputs, proximal=between.detach()), replace(inputs, proximal=between)
    assert gradient(ours(apart), apart).any()
    assert torch.equal(gradient(ours(made), made), gradient(ours(apart), apart))


@pytest.mark.parametrize("name", PAIRS)
def test_18_8_losses_and_gradients_are_finite_for_ratios_beyond_the_range_of_floats(name: str) -> None:
    """Ratios and discrepancies beyond e^1000 and below e^-1000 in float32, for both signs of the advantage."""
    ours, _ = PAIRS[name]
    far = torch.tensor([-1e-3, -1e3, -1e30])
    current, proximal, behavior, sign = torch.cartesian_prod(far, far, far, torch.tensor([-1.0, 1.0])).T[:, None]
    mask = torch.ones(current.shape, dtype=torch.bool)
    correction = correct(proximal, behavior, mask, missing=~mask, rules=Rules(weight="ratio"), limits=Limits())
    inputs = Inputs(current.clone().requires_grad_(), proximal, behavior, correction.weight, sign, mask)
    assert inputs.usable.all()
    outcome = ours(inputs)
    assert torch.isfinite(outcome.losses).all()
    assert torch.isfinite(gradient(outcome, inputs)).all()


@pytest.mark.parametrize("name", ["clipped", "dual_clip", "gspo", "minirl"])
def test_a_token_counts_as_clipped_exactly_if_its_gradient_is_zero(name: str) -> None:
    ours, _ = PAIRS[name]
    seen = 0
    for seed in range(CASES):
        inputs = inputs_of(draw(seed))
        outcome = ours(inputs)
        lost = inputs.usable & (gradient(outcome, inputs) == 0)
        assert (outcome.touched == lost).all(), f"seed {seed}"
        seen += int(lost.sum())
    assert seen > CASES


def test_with_all_bounds_off_every_objective_has_the_gradient_of_the_total_ratio() -> None:
    """algorithms.md 2.2: R A at each token. Trajectories have one token, so GSPO's ratio is the token's."""
    for seed in range(CASES):
        generator = np.random.default_rng(seed)
        shape = (6, 1)
        behavior = -generator.exponential(1.0, shape)
        proximal = behavior + generator.normal(0, 0.4, shape)
        current = proximal + generator.normal(0, 0.4, shape)
        data = oracle.Data(
            current,
            proximal,
            behavior,
            np.exp(proximal - behavior),
            generator.normal(0, 1, shape),
            np.ones(shape, dtype=bool),
        )
        expected = -np.exp(current - behavior) * data.advantages
        objectives: list[Ours] = [
            policy_gradient_loss,
            lambda inputs: ppo_loss(inputs, clip_low=1.0, clip_high=OFF),
            lambda inputs: gspo_loss(inputs, clip_low=1.0, clip_high=OFF),
            lambda inputs: cispo_loss(inputs, clip_low=1.0, clip_high=OFF),
            lambda inputs: minirl_loss(inputs, clip_low=1.0, clip_high=OFF),
            lambda inputs: r2vpo_loss(inputs, multiplier=0.0, target=0.02),
        ]
        for objective in objectives:
            inputs = inputs_of(data)
            np.testing.assert_allclose(gradient(objective(inputs), inputs), expected, rtol=1e-9)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "cause"),
    [
        (1.5, 1.0, -1.2, "clip_high"),
        (1.5, -1.0, 1.5, None),
        (0.5, -1.0, 0.8, "clip_low"),
        (0.5, 1.0, -0.5, None),
        (10.0, -1.0, 10.0, None),
        (1.1, 2.0, -2.2, None),
    ],
)
def test_the_clip_depends_on_the_sign_of_the_advantage(
    ratio: float, advantage: float, loss: float, cause: str | None
) -> None:
    outcome = ppo_loss(one(math.log(ratio), advantage), clip_low=0.2, clip_high=0.2)
    assert float(outcome.losses.detach()) == pytest.approx(loss, rel=1e-9)
    assert {name for name, where in outcome.clipped.items() if where.any()} == ({cause} if cause else set())


def test_the_dual_clip_bounds_the_loss_at_three_times_the_advantage() -> None:
    """algorithms.md 5: for A = -1 and r = 10 the loss is 10 without the dual clip and 3 with it."""
    inputs = one(math.log(10.0), -1.0)
    outcome = ppo_loss(inputs, clip_low=0.2, clip_high=0.2, dual_clip=3.0)
    assert float(outcome.losses.detach()) == pytest.approx(3.0)
    assert float(gradient(outcome, inputs)) == 0.0
    assert {name: bool(where) for name, where in outcome.clipped.items()} == {
        "clip_high": False, "clip_low": False, "ratio_bound": False, "dual": True,
    }  # fmt: skip


def test_the_dual_clip_ignores_positive_advantages() -> None:
    inputs = one(math.log(10.0), 1.0)
    with_it = ppo_loss(inputs, clip_low=0.2, clip_high=OFF, dual_clip=3.0)
    assert float(with_it.losses.detach()) == pytest.approx(-10.0)
    assert not with_it.touched.any()


@pytest.mark.parametrize(
    ("log_proximal", "clipped"), [(-1.10, True), (-0.95, False), (-1.20, True), (-0.975, False), (-0.96699, False)]
)
def test_the_clip_depends_on_the_proximal(log_proximal: float, clipped: bool) -> None:
    """Example A of algorithms.md 2.1: one token, A > 0, clip at 1.2."""
    inputs = one(-0.90 - log_proximal, 1.0, weight=math.exp(log_proximal + 1.20), log_discrepancy=log_proximal + 1.20)
    outcome = ppo_loss(inputs, clip_low=0.2, clip_high=0.2)
    assert bool(outcome.touched) is clipped
    assert float(policy_gradient_loss(inputs).losses.detach()) == pytest.approx(-1.34986, abs=5e-6)


def test_cispo_keeps_a_bounded_gradient_where_ppo_has_none() -> None:
    inputs = one(math.log(1.5), 1.0)
    assert float(gradient(ppo_loss(inputs, clip_low=0.2, clip_high=0.2), inputs)) == 0.0
    outcome = cispo_loss(inputs, clip_low=0.2, clip_high=0.2)
    assert float(gradient(outcome, inputs)) == pytest.approx(-1.2)
    assert bool(outcome.clipped["clip_high"])


def test_minirl_scales_by_the_total_ratio_and_uses_the_weight_only_as_a_mask() -> None:
    """Staleness ratio 1.1 and discrepancy 1.25: the factor is 1.375 for every positive weight."""
    for weight in (1.25, 1.0, 0.01):
        inputs = one(math.log(1.1), 2.0, weight=weight, log_discrepancy=math.log(1.25))
        outcome = minirl_loss(inputs, clip_low=0.2, clip_high=0.2)
        assert float(gradient(outcome, inputs)) == pytest.approx(-2 * 1.375)
    removed = one(math.log(1.1), 2.0, weight=0.0, log_discrepancy=math.log(1.25))
    assert float(gradient(minirl_loss(removed, clip_low=0.2, clip_high=0.2), removed)) == 0.0


@pytest.mark.parametrize(
    ("ratio", "advantage", "cause"),
    [(1.3, 1.0, "mask_high"), (1.3, -1.0, None), (0.7, -1.0, "mask_low"), (0.7, 1.0, None)],
)
def test_minirl_masks_by_the_staleness_ratio_not_by_the_total(
    ratio: float, advantage: float, cause: str | None
) -> None:
    """The discrepancy is the inverse of the ratio, so the total ratio is 1."""
    inputs = one(math.log(ratio), advantage, log_discrepancy=-math.log(ratio))
    outcome = minirl_loss(inputs, clip_low=0.2, clip_high=0.2)
    assert {name for name, where in outcome.clipped.items() if where.any()} == ({cause} if cause else set())
    assert float(gradient(outcome, inputs)) == pytest.approx(0.0 if cause else -advantage)


@pytest.mark.parametrize(
    "objective",
    [
        partial(ppo_loss, clip_low=0.2, clip_high=0.2),
        policy_gradient_loss,
        partial(r2vpo_loss, multiplier=0.1, target=0.02),
    ],
)
def test_a_log_ratio_outside_20_has_no_gradient_and_a_cause(objective: Callable[..., Outcome]) -> None:
    """A < 0 and a ratio of e^25: the clamp takes the gradient, so the token does not count as active."""
    inputs = one(25.0, -1.0)
    outcome = objective(inputs)
    assert gradient(outcome, inputs).item() == 0.0
    assert outcome.clipped["ratio_bound"].item()
    within = one(19.0, -1.0)
    outcome = objective(within)
    assert gradient(outcome, within).item() != 0.0
    assert not outcome.touched.any()


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({"clip_low": 1.5, "clip_high": 0.2}, "clip_low is 1.5"),
        ({"clip_low": -0.1, "clip_high": 0.2}, "clip_low is -0.1"),
        ({"clip_low": 0.2, "clip_high": -0.2}, "clip_high is -0.2"),
        ({"clip_low": 0.2, "clip_high": math.nan}, "clip_high is nan"),
    ],
)
@pytest.mark.parametrize("objective", [ppo_loss, gspo_loss, cispo_loss, minirl_loss])
def test_invalid_clip_bounds_are_refused(
    objective: Callable[..., Outcome], bounds: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        objective(one(0.1, 1.0), **bounds)


def test_a_dual_clip_not_above_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"dual_clip is 1\.0"):
        ppo_loss(one(0.1, 1.0), clip_low=0.2, clip_high=0.2, dual_clip=1.0)


def test_a_mask_of_integers_is_refused() -> None:
    flat = torch.zeros(1, 2)
    with pytest.raises(ValueError, match=r"torch.int64; it must be torch.bool"):
        Inputs(flat, flat, flat, flat, flat, torch.ones(1, 2, dtype=torch.int64))


def test_inputs_of_different_shapes_are_refused() -> None:
    flat = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="one shape"):
        Inputs(flat, flat, flat, flat, torch.zeros(1, 1), torch.ones(1, 2, dtype=torch.bool))
