"""Log-ratios, and how they are compared with a bound on the ratio. Pure."""

import math

import torch
from torch import Tensor

LOG_RATIO_BOUND = 20.0
"""Log-ratios are clamped to +-20 before they are exponentiated (e^20 is about 5e8)."""


def log_ratio(numerator: Tensor, denominator: Tensor, mask: Tensor) -> Tensor:
    """Difference of log-probs, 0 off the mask, clamped to +-20. [rows, tokens], nats, in the type of the log-probs.

    The ratio is numerator / denominator: above 0, the numerator's policy likes the token more.
    """
    difference = torch.where(mask, numerator - denominator, torch.zeros((), device=mask.device))
    return difference.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)


def above(log_values: Tensor, ratio: float) -> Tensor:
    """Where exp(log_values) > ratio. Compared as logarithms: nothing overflows. A ratio that is met is not above."""
    return log_values > _log(ratio, log_values)


def below(log_values: Tensor, ratio: float) -> Tensor:
    """Where exp(log_values) < ratio, compared as logarithms. Nothing is below 0."""
    return log_values < _log(ratio, log_values)


def outside(log_values: Tensor, interval: tuple[float, float]) -> Tensor:
    """Where exp(log_values) is in neither the interval nor on its ends."""
    low, high = interval
    return below(log_values, low) | above(log_values, high)


def row_sums(values: Tensor, counted: Tensor) -> Tensor:
    """Over the counted tokens of each row. [rows, 1] float64: a trajectory may have tens of thousands of terms."""
    return torch.where(counted, values.double(), 0.0).sum(dim=1, keepdim=True)


def row_counts(counted: Tensor) -> Tensor:
    """Counted tokens of each row. [rows, 1]"""
    return counted.sum(dim=1, keepdim=True)


def log_product(log_ratios: Tensor, counted: Tensor) -> Tensor:
    """log of the product of each row's ratios, clamped to +-20. [rows, 1], nats; 0 for a row without counted tokens."""
    total = row_sums(log_ratios, counted).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    return total.to(log_ratios.dtype)


def log_mean(log_ratios: Tensor, counted: Tensor) -> Tensor:
    """log of the geometric mean of each row's ratios. [rows, 1], nats; 0 for a row without counted tokens."""
    mean = row_sums(log_ratios, counted) / row_counts(counted).clamp(min=1)
    return mean.to(log_ratios.dtype)


def _log(ratio: float, like: Tensor) -> Tensor:
    # rounded to the type of the values, so that a value that is log(ratio) in that type is neither above nor below
    return torch.tensor(math.log(ratio) if ratio > 0 else -math.inf, dtype=like.dtype)
