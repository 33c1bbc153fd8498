"""Off-policy sequence mask: unlucky trajectories that the policy has left are let be (docs/algorithms/opsm.md). Pure.

    removed where A < 0 and mean_t (log pi_prox - log pi_theta) over the trajectory > delta

It is no objective: it takes tokens off the inputs of any.
"""

from torch import Tensor

from palimpsest.services.learner.corrections.ratios import log_mean, log_ratio
from palimpsest.services.learner.losses.types import Inputs


def opsm_mask(inputs: Inputs, *, threshold: float) -> Tensor:
    """bool [rows, tokens], without gradient: usable tokens to remove, for use before any objective:

        removed = opsm_mask(inputs, threshold=delta)
        outcome = ppo_loss(inputs.without(removed), ...).and_also(opsm=removed)

    threshold: delta, nats a token. The mean goes over the row's usable tokens; where advantages differ within a row,
    only tokens with a negative one are removed. Raises ValueError for a negative threshold, which would remove fresh
    trajectories.
    """
    if not threshold >= 0:
        raise ValueError(f"the threshold of OPSM is {threshold} nats a token: give 0 or more")
    usable = inputs.usable
    moved = log_ratio(inputs.proximal.detach(), inputs.current.detach(), usable)
    return usable & (inputs.advantages < 0) & (log_mean(moved, usable) > threshold)
