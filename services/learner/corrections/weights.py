"""The weight of a token's loss: its discrepancy, whole or bounded. Pure."""

from typing import Literal

import torch
from torch import Tensor

from palimpsest.services.learner.corrections.ratios import log_product


def weights(
    log_discrepancy: Tensor,
    usable: Tensor,
    *,
    kind: Literal["off", "ratio", "truncated", "clipped"],
    level: Literal["token", "sequence"],
    low: float,
    high: float,
) -> Tensor:
    """Before masking and normalizing. [rows, tokens], > 0 where usable; elsewhere without meaning.

    log_discrepancy: nats, 0 off usable, within +-20. `off`: 1. At the level of the sequence a token has the product of
    its row's usable ratios, whose log is within +-20 again. `truncated`: at most high; `clipped`: inside [low, high].
    """
    if kind == "off":
        return torch.ones_like(log_discrepancy)
    if level == "sequence":
        log_discrepancy = log_product(log_discrepancy, usable).expand_as(log_discrepancy)
    ratio = log_discrepancy.exp()
    if kind == "ratio":
        return ratio
    return ratio.clamp(min=low if kind == "clipped" else None, max=high)
