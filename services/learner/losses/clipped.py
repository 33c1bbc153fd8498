"""Decoupled clipped objective (docs/paper.md, "objective").

    L = - sum_t  w_t * min(r_t A_t, clip(r_t, 1 - low, 1 + high) A_t)  /  denominator

r = pi_theta / pi_prox is the update, w the (detached) discrepancy correction. With an exact proximal r is the staleness
ratio and the clip anchor of every token is its own version.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from services.learner.corrections import log_ratio


@dataclass(frozen=True, slots=True)
class Clipped:
    """What became of the tokens of one forward pass; [rows, tokens] where not said otherwise."""

    loss: Tensor
    """Scalar with gradient: a sum over tokens, already divided by the denominator."""
    log_update: Tensor
    """log r, detached; 0 off the mask."""
    clipped: Tensor
    """bool: the clipped branch was the smaller one, so that the token has no gradient."""


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
    """current, proximal: log-probs, nats; weight: 0 removes a token; mask: trainable tokens (unchanged by masking).

    `denominator` is the number of trainable tokens of the whole minibatch over all ranks, masked ones included:
    dividing by the surviving ones would raise the learning rate as more are masked.
    """
    usable = mask & (weight > 0) & torch.isfinite(current)
    log_update = log_ratio(current, proximal.detach(), usable)
    update = log_update.exp()
    unclipped = update * advantages
    bounded = update.clamp(1 - clip_low, 1 + clip_high) * advantages
    objective = torch.where(usable, weight * torch.minimum(unclipped, bounded), torch.zeros((), device=mask.device))
    return Clipped(
        loss=-objective.sum() / denominator,
        log_update=log_update.detach(),
        clipped=usable & (bounded < unclipped),
    )
