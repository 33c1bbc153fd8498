"""First-order form of the trajectory's objective, with PPO's clip as a mask (docs/algorithms/minirl.md). Pure.

    loss = -M sg( pi_theta / mu ) A log pi_theta
    M = 0 where (A > 0 and r > 1 + high) or (A < 0 and r < 1 - low), else 1,    r = pi_theta / pi_prox

sg: without gradient. With an exact proximal the mask sees what the policy has moved by, and nothing of the engine.
"""

from palimpsest.services.learner.corrections import log_ratio
from palimpsest.services.learner.losses.types import Inputs, Outcome, beyond, masked_fill_zero


def minirl_loss(inputs: Inputs, *, clip_low: float, clip_high: float) -> Outcome:
    """The factor is the total ratio, made here of current and behavior. So `weight` only says which tokens are kept:
    as a factor it would count the discrepancy twice. Raises ValueError for bounds that are none.

    Masked tokens are "mask_high" and "mask_low"; the loss's value means nothing. Meant for `seq_mean_token_sum`.
    """
    usable = inputs.usable
    log_update = log_ratio(inputs.current.detach(), inputs.proximal.detach(), usable)
    total = log_ratio(inputs.current.detach(), inputs.behavior.detach(), usable).exp()
    advantages = masked_fill_zero(inputs.advantages, usable)
    high, low = beyond(log_update.exp(), advantages, clip_low=clip_low, clip_high=clip_high)
    kept = usable & ~high & ~low
    value = total * advantages * masked_fill_zero(inputs.current, usable)
    return Outcome(masked_fill_zero(-value, kept), {"mask_high": high, "mask_low": low}, log_update)
