"""Log-ratios and their comparison with bounds of the ratio. Pure."""

import math

import torch
from torch import Tensor

LOG_RATIO_BOUND = 20.0
"""Log-ratios are clamped to +-20 before they are exponentiated (e^20 is about 5e8)."""


def log_ratio(numerator: Tensor, denominator: Tensor, mask: Tensor) -> Tensor:
    """Return log(numerator / denominator), 0 off the mask, clamped to +-20. [rows, tokens], nats.

    A positive value means that the numerator gives the token the higher probability.
    """
    return unclamped_log_ratio(numerator, denominator, mask).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)


def unclamped_log_ratio(numerator: Tensor, denominator: Tensor, mask: Tensor) -> Tensor:
    """Return log(numerator / denominator), 0 off the mask. [rows, tokens], nats. Sums over a row use these values."""
    return torch.where(mask, numerator - denominator, torch.zeros((), device=mask.device))


def beyond_bound(numerator: Tensor, denominator: Tensor, mask: Tensor) -> Tensor:
    """Return the tokens whose log-ratio is outside +-20, bool: where `log_ratio` is clamped and has no gradient."""
    return mask & (unclamped_log_ratio(numerator.detach(), denominator.detach(), mask).abs() > LOG_RATIO_BOUND)


def above(log_values: Tensor, ratio: float) -> Tensor:
    """Return where exp(log_values) > ratio. The comparison uses logarithms, so nothing overflows."""
    return log_values > _log(ratio, log_values)


def below(log_values: Tensor, ratio: float) -> Tensor:
    """Return where exp(log_values) < ratio, compared as logarithms."""
    return log_values < _log(ratio, log_values)


def outside(log_values: Tensor, interval: tuple[float, float]) -> Tensor:
    """Return where exp(log_values) is outside the closed interval."""
    low, high = interval
    return below(log_values, low) | above(log_values, high)


def row_sums(values: Tensor, counted: Tensor) -> Tensor:
    """Return the sum over the counted tokens of each row, [rows, 1] float64, because rows can be long."""
    return torch.where(counted, values.double(), 0.0).sum(dim=1, keepdim=True)


def row_counts(counted: Tensor) -> Tensor:
    """Return the number of counted tokens of each row, [rows, 1]."""
    return counted.sum(dim=1, keepdim=True)


def log_product(log_ratios: Tensor, counted: Tensor) -> Tensor:
    """Return the log of the product of each row's ratios, within +-20. [rows, 1], nats; 0 without counted tokens.

    The sum is clamped, not its terms: terms of -40, 12.5 and 12.5 give -15. log_ratios: unclamped.
    """
    total = row_sums(log_ratios, counted).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    return total.to(log_ratios.dtype)


def log_mean(log_ratios: Tensor, counted: Tensor) -> Tensor:
    """Return the log of the geometric mean of each row's ratios. [rows, 1], nats; 0 without counted tokens."""
    mean = row_sums(log_ratios, counted) / row_counts(counted).clamp(min=1)
    return mean.to(log_ratios.dtype)


def _log(ratio: float, like: Tensor) -> Tensor:
    # rounded to the dtype of the values, so that a value equal to log(ratio) in that dtype is neither above nor below
    return torch.tensor(math.log(ratio) if ratio > 0 else -math.inf, dtype=like.dtype)
