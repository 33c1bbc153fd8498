"""Off-policy sequence mask (OPSM): remove failed trajectories that became unlikely (docs/algorithms/opsm.md). Pure.

    removed where A < 0 and mean_t (log mu - log pi_theta) over the trajectory > delta

mu is the behavior policy, as in DeepSeek-V3.2. OPSM is not an objective: it removes tokens from the inputs of any
objective.
"""

from torch import Tensor

from palimpsest.services.learner.corrections.ratios import log_mean, unclamped_log_ratio
from palimpsest.services.learner.losses.types import Inputs


def opsm_mask(inputs: Inputs, *, threshold: float) -> Tensor:
    """Return the usable tokens to remove, bool [rows, tokens], without gradient. Apply it before an objective:

        removed = opsm_mask(inputs, threshold=delta)
        outcome = ppo_loss(inputs.without(removed), ...).and_also(opsm=removed)

    threshold: delta, nats per token. The mean covers the usable tokens of the row. Where advantages differ within a
    row, only tokens with a negative advantage are removed. Raises ValueError for a negative threshold, which would
    remove fresh trajectories.
    """
    if not threshold >= 0:
        raise ValueError(f"the OPSM threshold is {threshold} nats per token; it must be at least 0")
    usable = inputs.usable
    moved = unclamped_log_ratio(inputs.behavior.detach(), inputs.current.detach(), usable)
    return usable & (inputs.advantages < 0) & (log_mean(moved, usable) > threshold)
