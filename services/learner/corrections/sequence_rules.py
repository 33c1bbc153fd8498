"""Rules for a trajectory or for an unbroken run of its tokens. Pure.

All functions return bool [rows, tokens]: the trainable tokens of each row (or run) that fails. Only usable tokens (both
log-probs present and finite) enter a statistic. A row without usable tokens passes every rule. A statistic equal to its
bound passes.
"""

import torch
from torch import Tensor

from palimpsest.services.learner.corrections.ratios import below, log_mean, log_product, outside, row_counts, row_sums
from palimpsest.services.learner.corrections.rules import Interval
from palimpsest.services.learner.corrections.token_rules import divergence_estimate


def veto_rule(log_discrepancy: Tensor, usable: Tensor, mask: Tensor, bound: float) -> Tensor:
    """Return the rows with at least one token ratio below the bound."""
    return mask & (usable & below(log_discrepancy, bound)).any(dim=1, keepdim=True)


def sequence_rule(log_discrepancy: Tensor, usable: Tensor, mask: Tensor, interval: Interval) -> Tensor:
    """Return the rows whose product of ratios is outside. The log of the product is clamped to +-20."""
    return mask & outside(log_product(log_discrepancy, usable), interval)


def geometric_rule(log_discrepancy: Tensor, usable: Tensor, mask: Tensor, interval: Interval) -> Tensor:
    """Return the rows whose geometric mean of ratios is outside."""
    return mask & outside(log_mean(log_discrepancy, usable), interval)


def segment_rule(log_discrepancy: Tensor, usable: Tensor, mask: Tensor, interval: Interval) -> Tensor:
    """Return the unbroken runs of trainable tokens whose geometric mean of ratios is outside.

    A run ends at an untrainable token (another role's message, a tool result, padding). A change of version does not
    end it, and neither does a trainable token that is not usable.
    """
    number = runs(mask)
    own = number.clamp(min=0)
    shape = (len(mask), int(own.max()) + 1 if own.numel() else 0)
    # One sum for each run: the cost does not depend on the number of runs.
    terms = torch.where(usable, log_discrepancy.double(), 0.0)
    sums = torch.zeros(shape, dtype=torch.float64, device=mask.device).scatter_add_(1, own, terms)
    counts = torch.zeros(shape, dtype=torch.int64, device=mask.device).scatter_add_(1, own, usable.long())
    means = (sums / counts.clamp(min=1)).to(log_discrepancy.dtype)
    return mask & outside(means, interval).gather(1, own)


def estimate_rule(
    estimator: str, level: str, log_discrepancy: Tensor, usable: Tensor, mask: Tensor, bound: float
) -> Tensor:
    """Return the rows whose sum, mean or maximum of the token divergence estimates is above the bound.

    level: sequence_sum, sequence_mean or sequence_max. The sum is not clamped, because it is not exponentiated. Raises
    ValueError for an unknown level.
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
            raise ValueError(f"unknown level {level!r}; use sequence_sum, sequence_mean or sequence_max")
    return mask & (statistic > bound) & usable.any(dim=1, keepdim=True)


def runs(mask: Tensor) -> Tensor:
    """Return the index of the unbroken run of each trainable token, from 0 in every row; -1 off the mask."""
    before = torch.zeros_like(mask)
    before[:, 1:] = mask[:, :-1]
    return torch.where(mask, (mask & ~before).cumsum(dim=1) - 1, -1)
