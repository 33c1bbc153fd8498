"""CISPO: the clipped ratio weights the log-prob, and every token keeps its gradient (docs/algorithms/cispo.md). Pure.

    loss = -w sg( clip(r, 1 - low, 1 + high) ) A log pi_theta,    r = pi_theta / pi_prox

sg: stop-gradient.
"""

from palimpsest.services.learner.corrections import log_ratio
from palimpsest.services.learner.losses.types import Inputs, Outcome, masked_fill_zero, refuse_bounds


def cispo_loss(inputs: Inputs, *, clip_low: float, clip_high: float) -> Outcome:
    """Return the loss of each token. The causes "clip_high" and "clip_low" mark tokens with a bounded ratio.

    A bounded token keeps a gradient, for either sign of its advantage. Only the gradient of the loss is meaningful, not
    its value. Raises ValueError for invalid bounds.
    """
    refuse_bounds(clip_low, clip_high)
    usable = inputs.usable
    log_update = log_ratio(inputs.current.detach(), inputs.proximal.detach(), usable)
    ratio, advantages = log_update.exp(), masked_fill_zero(inputs.advantages, usable)
    value = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages * masked_fill_zero(inputs.current, usable)
    # an advantage of 0 gives no gradient to bound
    high, low = (advantages != 0) & (ratio > 1 + clip_high), (advantages != 0) & (ratio < 1 - clip_low)
    return Outcome(masked_fill_zero(-inputs.weight * value, usable), {"clip_high": high, "clip_low": low}, log_update)
