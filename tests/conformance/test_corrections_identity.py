"""The two factors for every proximal; interpolated ones are bands on the total ratio (algorithms.md 2, 18.1, 18.2)."""

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from palimpsest.services.learner.corrections import Limits, Rules, correct, log_ratio
from palimpsest.services.learner.losses.ppo_clip import ppo_loss
from palimpsest.services.learner.losses.types import Inputs

Array = NDArray[np.float64]
DRAWS = 200
BEHAVIOR, OLD, CURRENT, ASYNC = -1.20, -1.10, -0.90, -0.95
EDGE = 1e-9
"""Nats. Draws nearer than this to a bound are excluded: rounding decides them."""


def arithmetic(behavior: Array | float, current: Array | float, share: float) -> Array:
    """log(share mu + (1 - share) pi_theta)."""
    return np.logaddexp(np.log(share) + behavior, np.log1p(-share) + current)


def loglinear(behavior: Array | float, current: Array | float, staleness: int) -> Array:
    """Log-linear mixture with weight (d - 1) / d on the current log-prob."""
    weight = (staleness - 1) / staleness
    return np.asarray((1 - weight) * behavior + weight * current)


def masks_and_gradient(
    proximal: Array, behavior: Array, current: Array, advantages: Array, *, band: float | None, clip: float
) -> tuple[Array, Array, Array]:
    """Kept and clipped tokens (bool) and the gradient of the loss, each [tokens]."""
    anchor, sampler, signs = (torch.tensor(x, dtype=torch.float64)[None] for x in (proximal, behavior, advantages))
    live = torch.tensor(current, dtype=torch.float64)[None].requires_grad_()
    mask = torch.ones_like(anchor, dtype=torch.bool)
    rules = Rules(weight="ratio", band=band)
    got = correct(anchor, sampler, mask, missing=~mask, rules=rules, limits=Limits())
    outcome = ppo_loss(Inputs(live, anchor, sampler, got.weight, signs, mask), clip_low=clip, clip_high=clip)
    outcome.losses.sum().backward()
    assert live.grad is not None
    clipped = outcome.clipped["clip_high"] | outcome.clipped["clip_low"]
    return (mask & ~got.masked)[0].numpy(), clipped[0].numpy(), live.grad[0].numpy()


def draws(seed: int) -> tuple[Array, Array]:
    generator = np.random.default_rng(seed)
    behavior = -generator.exponential(1.5, 64) - 0.01
    return behavior, np.minimum(behavior + generator.normal(0, 0.6, 64), -1e-3)


TABLE = [
    pytest.param(OLD, 1.10517, 1.22140, False, True, id="exact"),
    pytest.param(ASYNC, 1.28403, 1.05127, True, False, id="current_recompute"),
    pytest.param(BEHAVIOR, 1.0, 1.34986, False, True, id="bypass"),
    pytest.param(float(loglinear(BEHAVIOR, CURRENT, 4)), 1.25232, 1.07788, True, False, id="loglinear d=4"),
    pytest.param(float(arithmetic(BEHAVIOR, CURRENT, 0.25)), 1.26239, 1.06928, True, False, id="arithmetic"),
]


@pytest.mark.parametrize(("proximal", "discrepancy", "staleness", "masked", "clipped"), TABLE)
def test_18_2_example_a(proximal: float, discrepancy: float, staleness: float, masked: bool, clipped: bool) -> None:
    """c = 1.2, epsilon = 0.2, A > 0."""
    yes = torch.tensor([[True]])
    anchor, behavior, current = (torch.tensor([[x]], dtype=torch.float64) for x in (proximal, BEHAVIOR, CURRENT))
    weight = correct(anchor, behavior, yes, missing=~yes, rules=Rules(weight="ratio"), limits=Limits()).weight
    update = log_ratio(current, anchor, yes).exp()
    assert float(weight) == pytest.approx(discrepancy, abs=5e-6)
    assert float(update) == pytest.approx(staleness, abs=5e-6)
    assert float(weight * update) == pytest.approx(1.34986, abs=5e-6)
    kept, hit, _ = masks_and_gradient(*(np.array([x]) for x in (proximal, BEHAVIOR, CURRENT, 1.0)), band=1.2, clip=0.2)
    assert (not kept[0], bool(hit[0])) == (masked, clipped)


def test_18_2_the_arithmetic_proximal_of_example_a() -> None:
    assert float(arithmetic(BEHAVIOR, CURRENT, 0.25)) == pytest.approx(-0.96699, abs=5e-6)


def proximals(behavior: Array, current: Array, generator: np.random.Generator) -> dict[str, Array]:
    return {
        "exact": behavior + generator.normal(0, 0.1, behavior.shape),
        "current_recompute": current + generator.normal(0, 0.05, behavior.shape),
        "bypass": behavior,
        "loglinear": loglinear(behavior, current, int(generator.integers(2, 9))),
        "arithmetic": arithmetic(behavior, current, float(generator.uniform(0.05, 0.95))),
        "anything": -generator.exponential(2.0, behavior.shape),
    }


def test_18_1_the_two_factors_multiply_to_the_total_ratio_for_every_proximal() -> None:
    for seed in range(DRAWS):
        behavior, current = draws(seed)
        total = np.exp(current - behavior)
        for name, proximal in proximals(behavior, current, np.random.default_rng(seed)).items():
            anchor, sampler, live = (torch.tensor(x)[None] for x in (proximal, behavior, current))
            mask = torch.ones_like(anchor, dtype=torch.bool)
            weight = correct(anchor, sampler, mask, missing=~mask, rules=Rules(weight="ratio"), limits=Limits()).weight
            product = (weight * log_ratio(live, anchor, mask).exp())[0].numpy()
            np.testing.assert_allclose(product, total, rtol=1e-6, err_msg=f"{name}, seed {seed}")


def test_18_1_with_every_threshold_off_all_proximals_give_one_gradient() -> None:
    for seed in range(DRAWS):
        behavior, current = draws(seed)
        generator = np.random.default_rng(seed)
        advantages = generator.normal(0, 1, behavior.shape)
        expected = -np.exp(current - behavior) * advantages
        for name, proximal in proximals(behavior, current, generator).items():
            # a lower bound of 0 and an upper bound of 1e9 never bind
            live = torch.tensor(current)[None].requires_grad_()
            anchor, sampler, signs = (torch.tensor(x)[None] for x in (proximal, behavior, advantages))
            mask = torch.ones_like(anchor, dtype=torch.bool)
            got = correct(anchor, sampler, mask, missing=~mask, rules=Rules(weight="ratio"), limits=Limits())
            losses = ppo_loss(
                Inputs(live, anchor, sampler, got.weight, signs, mask), clip_low=1.0, clip_high=1e9
            ).losses
            losses.sum().backward()
            assert live.grad is not None
            np.testing.assert_allclose(live.grad[0].numpy(), expected, rtol=1e-6, err_msg=f"{name}, seed {seed}")


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_18_2_loglinear_is_a_band_on_the_total_ratio(sign: float) -> None:
    """r_d = R^a and r_s = R^(1 - a), so both constraints are bands on R (Proposition 1)."""
    seen = np.zeros(2, dtype=int)
    for seed in range(DRAWS):
        generator = np.random.default_rng(seed)
        behavior, current = draws(seed)
        staleness = int(generator.integers(2, 9))
        band, clip = float(generator.uniform(1.02, 1.6)), float(generator.uniform(0.05, 0.5))
        a, log_total = (staleness - 1) / staleness, current - behavior
        kept, clipped, _ = masks_and_gradient(
            loglinear(behavior, current, staleness), behavior, current, np.full(64, sign), band=band, clip=clip
        )
        edge = math.log(1 + sign * clip) / (1 - a)
        sure = (np.abs(np.abs(log_total) - math.log(band) / a) > EDGE) & (np.abs(log_total - edge) > EDGE)
        inside = np.abs(log_total) <= math.log(band) / a
        beyond = sign * log_total > sign * edge
        np.testing.assert_array_equal(kept[sure], inside[sure], err_msg=f"seed {seed}")
        np.testing.assert_array_equal(clipped[sure], (inside & beyond)[sure], err_msg=f"seed {seed}")
        seen += (int((~inside).sum()), int((inside & beyond).sum()))
    assert seen.min() > 0


def test_18_2_loglinear_at_staleness_4_never_clips_a_kept_token() -> None:
    """The clip's band [0.4096, 2.0736] contains the mask's [0.7842, 1.2752]."""
    total = np.log([0.7841, 0.7843, 1.2751, 1.2753])
    behavior = np.full(4, -3.0)
    current = behavior + total
    kept, _, _ = masks_and_gradient(loglinear(behavior, current, 4), behavior, current, np.ones(4), band=1.2, clip=0.2)
    assert kept.tolist() == [False, True, True, False]
    kept_somewhere = 0
    for seed in range(DRAWS):
        behavior, current = draws(seed)
        for sign in (1.0, -1.0):
            kept, clipped, gradient = masks_and_gradient(
                loglinear(behavior, current, 4), behavior, current, np.full(64, sign), band=1.2, clip=0.2
            )
            assert not clipped.any()
            np.testing.assert_array_equal(gradient != 0, kept)
            kept_somewhere += int(kept.sum())
    assert kept_somewhere > 1000


@pytest.mark.parametrize(
    ("share", "low", "high"), [(0.25, 0.5, 3.0), (0.5, 0.6667, 1.5), (1 / 6, 0.4, math.inf)], ids=str
)
def test_18_2_arithmetic_is_a_band_on_the_total_ratio(share: float, low: float, high: float) -> None:
    """r_s = R / (share + (1 - share) R) and r_d = share + (1 - share) R; no upper clip from share <= 0.2 / 1.2 on."""

    def edge(bound: float) -> float:
        below = 1 - (1 - share) * bound
        return share * bound / below if below > 1e-12 else math.inf

    assert (edge(0.8), edge(1.2)) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))
    for seed in range(DRAWS):
        behavior, current = draws(seed)
        total, proximal = np.exp(current - behavior), arithmetic(behavior, current, share)
        for sign, beyond in ((1.0, total > edge(1.2)), (-1.0, total < edge(0.8))):
            advantages = np.full(64, sign)
            kept, clipped, _ = masks_and_gradient(proximal, behavior, current, advantages, band=None, clip=0.2)
            sure = np.abs(total - edge(1.2 if sign > 0 else 0.8)) > EDGE
            assert kept.all()
            np.testing.assert_array_equal(clipped[sure], beyond[sure], err_msg=f"seed {seed}")
            if share <= 0.2 / 1.2 and sign > 0:
                assert not clipped.any()
        kept, _, _ = masks_and_gradient(proximal, behavior, current, advantages, band=1.2, clip=0.2)
        mixed = share + (1 - share) * total
        inside = (mixed >= 1 / 1.2) & (mixed <= 1.2)
        sure = (np.abs(mixed - 1.2) > EDGE) & (np.abs(mixed - 1 / 1.2) > EDGE)
        np.testing.assert_array_equal(kept[sure], inside[sure], err_msg=f"seed {seed}")
