"""R2VPO: a penalty on the variance of the ratio in place of a clip (docs/algorithms/r2vpo.md). Pure.

    loss = -w ( r A - lambda ((r - 1)^2 - delta) ),    r = pi_theta / pi_prox

E[r] = 1 under the policy in the denominator, so E[(r - 1)^2] is the variance of r. The gradient with respect to a
token's log-prob is -w r (A - 2 lambda (r - 1)).
"""

import torch
from torch import Tensor

from palimpsest.services.learner.corrections.ratios import beyond_bound, log_ratio
from palimpsest.services.learner.losses.types import Inputs, Outcome, masked_fill_zero


def r2vpo_loss(inputs: Inputs, *, multiplier: float, target: float) -> Outcome:
    """Return the loss of each token. multiplier: lambda; target: delta, which shifts the value and has no gradient.

    The cause "ratio_bound" marks tokens with a log-ratio outside +-20, which have no gradient.

    Raises ValueError for a negative multiplier, which would reward variance.
    """
    if not multiplier >= 0:
        raise ValueError(f"the R2VPO multiplier is {multiplier}; it must be at least 0")
    usable = inputs.usable
    log_update = log_ratio(inputs.current, inputs.proximal.detach(), usable)
    value = log_update.exp() * masked_fill_zero(inputs.advantages, usable)
    value = value - multiplier * (squared_deviation(log_update) - target)
    lost = {"ratio_bound": beyond_bound(inputs.current, inputs.proximal, usable)}
    return Outcome(masked_fill_zero(-inputs.weight * value, usable), lost, log_update.detach())


def squared_deviation(log_update: Tensor) -> Tensor:
    """Return (r - 1)^2 of each token. The mean over a version's usable tokens on all ranks is an input of
    next_multiplier."""
    return torch.expm1(log_update).square()


def next_multiplier(multiplier: float, mean_square: float, target: float, rate: float) -> float:
    """Return lambda of the next version: it rises where the mean (r - 1)^2 exceeds the target and falls otherwise.

    The result is never negative. A mean that is not finite (no usable token) leaves lambda unchanged.
    """
    if not abs(mean_square) < float("inf"):
        return multiplier
    return max(0.0, multiplier + rate * (mean_square - target))
