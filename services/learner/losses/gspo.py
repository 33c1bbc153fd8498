"""GSPO: one ratio per trajectory, the geometric mean of its token ratios (docs/algorithms/gspo.md). Pure.

    s_i = exp( mean_t (log pi_theta - log pi_prox) )        s_it = sg(s_i) * pi_theta / sg(pi_theta)
    loss = -w min(s_it A, clip(s_it, 1 - low, 1 + high) A)

s_it has the value of s_i and the gradient of its own token, so advantages may differ between tokens. With equal
advantages, the mean over the trajectory has the value and the gradient of the sequence-level objective.
"""

import torch

from palimpsest.services.learner.corrections.ratios import LOG_RATIO_BOUND, log_mean, unclamped_log_ratio
from palimpsest.services.learner.losses.types import Inputs, Outcome, beyond, masked_fill_zero


def gspo_loss(inputs: Inputs, *, clip_low: float, clip_high: float) -> Outcome:
    """Return the loss of each token. Typical bounds are 3e-4 and 4e-4. Raises ValueError for invalid bounds.

    The mean covers the usable tokens of the row; removed and missing tokens do not enter it. Use it with the
    aggregation `seq_mean_token_mean`. log_update is log s_i at every usable token.
    """
    usable = inputs.usable
    difference = unclamped_log_ratio(inputs.current.detach(), inputs.proximal.detach(), usable)
    mean = log_mean(difference, usable).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    log_update = masked_fill_zero(mean.expand_as(difference), usable)
    ratio, advantages = log_update.exp(), masked_fill_zero(inputs.advantages, usable)
    current = masked_fill_zero(inputs.current, usable)
    high, low = beyond(ratio, advantages, clip_low=clip_low, clip_high=clip_high)
    value = ratio * (current - current.detach()).exp() * advantages
    value = torch.where(high, (1 + clip_high) * advantages, value)
    value = torch.where(low, (1 - clip_low) * advantages, value)
    return Outcome(masked_fill_zero(-inputs.weight * value, usable), {"clip_high": high, "clip_low": low}, log_update)
