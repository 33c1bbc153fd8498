"""The decoupled clipped objective in two calls: correction and loss."""

from dataclasses import dataclass

from torch import Tensor, zeros_like

from palimpsest.services.learner.corrections import Correction, Limits, Rules, correct
from palimpsest.services.learner.losses.aggregate import Denominators, aggregate
from palimpsest.services.learner.losses.ppo_clip import ppo_loss
from palimpsest.services.learner.losses.types import Inputs


@dataclass(frozen=True)
class Clipped:
    """Scalar loss with gradient, and the mask of clipped tokens."""

    loss: Tensor
    clipped: Tensor


def discrepancy_band(
    proximal: Tensor, behavior: Tensor, mask: Tensor, *, band: float, use_mask: bool, use_weight: bool
) -> Correction:
    """Correction with a band, a ratio weight, or both."""
    rules = Rules(weight="ratio" if use_weight else "off", band=band if use_mask else None)
    return correct(proximal, behavior, mask, missing=zeros_like(mask), rules=rules, limits=Limits())


def clipped_loss(
    current: Tensor,
    proximal: Tensor,
    weight: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    denominator: float,
) -> Clipped:
    """Clipped loss, summed and divided by `denominator` tokens. The weight replaces the behavior log-probs."""
    inputs = Inputs(current, proximal, zeros_like(proximal), weight, advantages, mask)
    outcome = ppo_loss(inputs, clip_low=clip_low, clip_high=clip_high)
    loss = aggregate(outcome.losses, mask, "token_mean", Denominators(int(denominator), 1, 1))
    return Clipped(loss, outcome.touched)
