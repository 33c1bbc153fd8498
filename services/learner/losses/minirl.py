"""MiniRL: first-order form of the sequence objective, with the PPO clip as a mask (docs/algorithms/minirl.md). Pure.

    loss = -M sg( pi_theta / mu ) A log pi_theta
    M = 0 where (A > 0 and r > 1 + high) or (A < 0 and r < 1 - low), else 1,    r = pi_theta / pi_prox

sg: stop-gradient. With an exact proximal, the mask judges the staleness ratio without the discrepancy.
"""

from palimpsest.services.learner.corrections import log_ratio
from palimpsest.services.learner.losses.types import Inputs, Outcome, beyond, masked_fill_zero


def minirl_loss(inputs: Inputs, *, clip_low: float, clip_high: float) -> Outcome:
    """Return the loss of each token. The causes of masked tokens are "mask_high" and "mask_low".

    The factor is the total ratio of current and behavior. `weight` only selects the kept tokens, because as a factor it
    would count the discrepancy twice. Only the gradient of the loss is meaningful, not its value. Use it with the
    aggregation `seq_mean_token_sum`. Raises ValueError for invalid bounds.
    """
    usable = inputs.usable
    log_update = log_ratio(inputs.current.detach(), inputs.proximal.detach(), usable)
    total = log_ratio(inputs.current.detach(), inputs.behavior.detach(), usable).exp()
    advantages = masked_fill_zero(inputs.advantages, usable)
    high, low = beyond(log_update.exp(), advantages, clip_low=clip_low, clip_high=clip_high)
    kept = usable & ~high & ~low
    value = total * advantages * masked_fill_zero(inputs.current, usable)
    return Outcome(masked_fill_zero(-value, kept), {"mask_high": high, "mask_low": low}, log_update)
