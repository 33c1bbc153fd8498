"""Rules that judge many tokens together: a trajectory, or an unbroken run of its tokens. Pure.

All return bool [rows, tokens]: every trainable token of a row (or run) that fails. Only usable tokens speak (both
log-probs are there and finite): the others neither add to a statistic nor count in its mean. A row without usable
tokens fails no rule. A bound that is met exactly keeps the row.
"""

import torch
from torch import Tensor

from palimpsest.services.learner.corrections.ratios import below, log_mean, log_product, outside, row_counts, row_sums
from palimpsest.services.learner.corrections.rules import Interval
from palimpsest.services.learner.corrections.token_rules import divergence_estimate


def veto_rule(log_discrepancy: Tensor, usable: Tensor, mask: Tensor, bound: float) -> Tensor:
    """Rows in which the ratio of any token is below the bound."""
    return mask & (usable & below(log_discrepancy, bound)).any(dim=1, keepdim=True)


def sequence_rule(log_discrepancy: Tensor, usable: Tensor, mask: Tensor, interval: Interval) -> Tensor:
    """Rows whose product of ratios is outside; its log is within +-20."""
    return mask & outside(log_product(log_discrepancy, usable), interval)


def geometric_rule(log_discrepancy: Tensor, usable: Tensor, mask: Tensor, interval: Interval) -> Tensor:
    """Rows whose geometric mean of ratios is outside."""
    return mask & outside(log_mean(log_discrepancy, usable), interval)


def segment_rule(log_discrepancy: Tensor, usable: Tensor, mask: Tensor, interval: Interval) -> Tensor:
    """Unbroken runs of trainable tokens whose geometric mean of ratios is outside.

    A run ends where an untrainable token stands (another's message, a tool's answer, padding), not where the version
    changes, and not at a token that is trainable without being usable.
    """
    number = runs(mask)
    removed = torch.zeros_like(mask)
    # a row has as many runs as turns: few. One after another keeps every sum in the order of its tokens.
    for run in range(int(number.max()) + 1 if number.numel() else 0):
        of_run = number == run
        removed |= of_run & outside(log_mean(log_discrepancy, usable & of_run), interval)
    return removed


def estimate_rule(
    estimator: str, level: str, log_discrepancy: Tensor, usable: Tensor, mask: Tensor, bound: float
) -> Tensor:
    """Rows whose tokens' divergence estimates have a sum, mean or maximum above the bound.

    level: sequence_sum, sequence_mean or sequence_max; raises ValueError for another. Nothing is exponentiated after
    the sum, so that it is not clamped.
    """
    estimates = divergence_estimate(estimator, log_discrepancy)
    match level:
        case "sequence_sum":
            statistic = row_sums(estimates, usable)
        case "sequence_mean":
            statistic = row_sums(estimates, usable) / row_counts(usable).clamp(min=1)
        case "sequence_max":
            statistic = torch.where(usable, estimates, -torch.inf).amax(dim=1, keepdim=True)
        case _:
            raise ValueError(f"there is no level {level}, only sequence_sum, sequence_mean and sequence_max")
    return mask & (statistic > bound) & usable.any(dim=1, keepdim=True)


def runs(mask: Tensor) -> Tensor:
    """Number of the unbroken run that each trainable token belongs to, from 0 in every row; -1 off the mask."""
    before = torch.zeros_like(mask)
    before[:, 1:] = mask[:, :-1]
    return torch.where(mask, (mask & ~before).cumsum(dim=1) - 1, -1)
