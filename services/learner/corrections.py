"""What the discrepancy (and only the discrepancy) does to a token: its weight and its mask. Pure.

Nothing here carries a gradient: the discrepancy compares two engines at one set of weights.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

LOG_RATIO_BOUND = 20.0
"""Log-ratios are clamped to +-20 before they are exponentiated (e^20 is about 5e8)."""


@dataclass(frozen=True, slots=True)
class Correction:
    """[rows, tokens] each."""

    weight: Tensor
    """float32: factor on the token's loss; 1 where weighting is off, 0 where masked or untrainable."""
    masked: Tensor
    """bool: trainable, but outside the band or not finite."""


def log_ratio(numerator: Tensor, denominator: Tensor, mask: Tensor) -> Tensor:
    """Difference of log-probs, 0 off the mask, clamped to +-20. [rows, tokens] float32, nats"""
    difference = torch.where(mask, numerator - denominator, torch.zeros((), device=mask.device))
    return difference.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)


def discrepancy_band(
    proximal: Tensor, behavior: Tensor, mask: Tensor, *, band: float, use_mask: bool, use_weight: bool
) -> Correction:
    """Symmetric band [1/band, band] on the ratio proximal / behavior (docs/paper.md, "discrepancy mask").

    proximal, behavior: [rows, tokens] log-probs, nats, without gradient; mask: trainable tokens. A token with a
    log-prob that is not finite is always masked: it is never given another number.
    """
    finite = torch.isfinite(proximal) & torch.isfinite(behavior)
    usable = mask & finite
    log_discrepancy = log_ratio(proximal.detach(), behavior, usable)
    bound = torch.log(torch.tensor(band, dtype=torch.float32))
    outside = (log_discrepancy.abs() > bound) if use_mask else torch.zeros_like(mask)
    masked = mask & (~finite | outside)
    weight = log_discrepancy.exp() if use_weight else torch.ones_like(log_discrepancy)
    return Correction(torch.where(mask & ~masked, weight, torch.zeros((), device=mask.device)), masked)
