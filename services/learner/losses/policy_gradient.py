"""Policy gradient: the weighted ratio without a clip (docs/algorithms/ppo-clip.md, "without the clip"). Pure.

    loss = -w r A,    r = pi_theta / pi_prox

With the weight w = pi_prox / mu, the loss is minus the total ratio times the advantage for any proximal.
"""

from palimpsest.services.learner.corrections.ratios import beyond_bound, log_ratio
from palimpsest.services.learner.losses.types import Inputs, Outcome, masked_fill_zero


def policy_gradient_loss(inputs: Inputs) -> Outcome:
    """Return the loss of each token. "ratio_bound" marks tokens with a log-ratio outside +-20, without a gradient."""
    usable = inputs.usable
    log_update = log_ratio(inputs.current, inputs.proximal.detach(), usable)
    value = log_update.exp() * masked_fill_zero(inputs.advantages, usable)
    lost = {"ratio_bound": beyond_bound(inputs.current, inputs.proximal, usable)}
    return Outcome(masked_fill_zero(-inputs.weight * value, usable), lost, log_update.detach())
