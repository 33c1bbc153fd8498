"""A penalty on the ratio's variance in place of a clip (docs/algorithms/r2vpo.md). Pure.

    loss = -w ( r A - lambda ((r - 1)^2 - delta) ),    r = pi_theta / pi_prox

As E[r] = 1 under the policy that stands in the denominator, E[(r - 1)^2] is r's variance. A token's log-prob has the
gradient -w r (A - 2 lambda (r - 1)).
"""

import torch
from torch import Tensor

from palimpsest.services.learner.corrections import log_ratio
from palimpsest.services.learner.losses.types import Inputs, Outcome, masked_fill_zero


def r2vpo_loss(inputs: Inputs, *, multiplier: float, target: float) -> Outcome:
    """multiplier: lambda; target: delta, which moves the loss's value and no gradient. Nothing is clipped.

    Raises ValueError for a negative multiplier: it would reward variance.
    """
    if not multiplier >= 0:
        raise ValueError(f"the multiplier of R2VPO is {multiplier}: it weighs a penalty, give 0 or more")
    usable = inputs.usable
    log_update = log_ratio(inputs.current, inputs.proximal.detach(), usable)
    value = log_update.exp() * masked_fill_zero(inputs.advantages, usable)
    value = value - multiplier * (squared_deviation(log_update) - target)
    return Outcome(masked_fill_zero(-inputs.weight * value, usable), {}, log_update.detach())


def squared_deviation(log_update: Tensor) -> Tensor:
    """(r - 1)^2 of each token, 0 where log r is. Its mean over a version's usable tokens, over all ranks, is what
    next_multiplier is told."""
    return torch.expm1(log_update).square()


def next_multiplier(multiplier: float, mean_square: float, target: float, rate: float) -> float:
    """lambda for the next version: up where the mean (r - 1)^2 was above its target, down where below, never negative.

    A mean that is not finite (no usable token) changes nothing.
    """
    if not abs(mean_square) < float("inf"):
        return multiplier
    return max(0.0, multiplier + rate * (mean_square - target))
