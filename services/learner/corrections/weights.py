"""The weight of a token's loss: the discrepancy, unbounded or bounded. Pure."""

from typing import Literal

import torch
from torch import Tensor

from palimpsest.services.learner.corrections.ratios import LOG_RATIO_BOUND, log_product


def weights(
    log_discrepancy: Tensor,
    usable: Tensor,
    *,
    kind: Literal["off", "ratio", "truncated", "clipped"],
    level: Literal["token", "sequence"],
    low: float,
    high: float,
) -> Tensor:
    """Return the weights before masking and normalization. [rows, tokens], > 0 where usable, undefined elsewhere.

    log_discrepancy: nats, 0 off `usable`, unclamped. `off`: 1. At the sequence level, each token has the product of
    the usable ratios of its row; the log of the product is clamped to +-20. `truncated`: at most high; `clipped`:
    within [low, high].
    """
    if kind == "off":
        return torch.ones_like(log_discrepancy)
    if level == "sequence":
        log_discrepancy = log_product(log_discrepancy, usable).expand_as(log_discrepancy)
    ratio = log_discrepancy.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()
    if kind == "ratio":
        return ratio
    return ratio.clamp(min=low if kind == "clipped" else None, max=high)
