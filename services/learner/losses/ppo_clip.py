"""Decoupled clipped objective (docs/paper.md, "objective"; docs/algorithms/ppo-clip.md, docs/algorithms/dual-clip.md).

    C = min(r A, clip(r, 1 - low, 1 + high) A)        with a dual clip c, where A < 0: max(C, c A)
    loss = -w C

r = pi_theta / pi_prox is the update, and w is the detached discrepancy correction. With an exact proximal, r is the
staleness ratio, and the clip anchor of each token is the version that sampled it.
"""

import torch

from palimpsest.services.learner.corrections.ratios import beyond_bound, log_ratio
from palimpsest.services.learner.losses.types import Inputs, Outcome, beyond, masked_fill_zero


def ppo_loss(inputs: Inputs, *, clip_low: float, clip_high: float, dual_clip: float | None = None) -> Outcome:
    """Return the loss of each token. A token with the cause "clip_high", "clip_low", "dual" or "ratio_bound" has no
    gradient. "ratio_bound": the log-ratio is outside +-20, where it is clamped.

    dual_clip: bounds the loss of a token with a negative advantage to this multiple of |A|; None: off. Raises
    ValueError for invalid bounds.
    """
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip is {dual_clip}; it must be above 1")
    usable = inputs.usable
    log_update = log_ratio(inputs.current, inputs.proximal.detach(), usable)
    update, advantages = log_update.exp(), masked_fill_zero(inputs.advantages, usable)
    high, low = beyond(update.detach(), advantages, clip_low=clip_low, clip_high=clip_high)
    value = torch.where(high, (1 + clip_high) * advantages, update * advantages)
    value = torch.where(low, (1 - clip_low) * advantages, value)
    lost = beyond_bound(inputs.current, inputs.proximal, usable)
    clipped = {"clip_high": high, "clip_low": low, "ratio_bound": lost & (advantages != 0)}
    if dual_clip is not None:
        clipped["dual"] = (advantages < 0) & (update.detach() > dual_clip)
        value = torch.where(clipped["dual"], dual_clip * advantages, value)
    return Outcome(masked_fill_zero(-inputs.weight * value, usable), clipped, log_update.detach())
