"""The clipped ratio as a weight on the log-prob: no token loses its gradient (docs/algorithms/cispo.md). Pure.

    loss = -w sg( clip(r, 1 - low, 1 + high) ) A log pi_theta,    r = pi_theta / pi_prox

sg: without gradient.
"""

from palimpsest.services.learner.corrections import log_ratio
from palimpsest.services.learner.losses.types import Inputs, Outcome, masked_fill_zero, refuse_bounds


def cispo_loss(inputs: Inputs, *, clip_low: float, clip_high: float) -> Outcome:
    """Where the ratio was bounded ("clip_high", "clip_low", whatever the advantage's sign) the gradient is bounded with
    it, not gone. The loss's value means nothing. Raises ValueError for bounds that are none.
    """
    refuse_bounds(clip_low, clip_high)
    usable = inputs.usable
    log_update = log_ratio(inputs.current.detach(), inputs.proximal.detach(), usable)
    ratio, advantages = log_update.exp(), masked_fill_zero(inputs.advantages, usable)
    value = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages * masked_fill_zero(inputs.current, usable)
    # without an advantage there is nothing to bound
    high, low = (advantages != 0) & (ratio > 1 + clip_high), (advantages != 0) & (ratio < 1 - clip_low)
    return Outcome(masked_fill_zero(-inputs.weight * value, usable), {"clip_high": high, "clip_low": low}, log_update)
