"""Inputs and outputs of an objective. Pure.

An objective computes the loss of each token; aggregate.py divides the sum.
"""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """One micro-batch: [rows, tokens] each, log-probs in nats. Only `current` has a gradient.

    Raises ValueError if shapes differ or the mask is not boolean (`~` negates an integer mask bit by bit).
    """

    current: Tensor
    proximal: Tensor
    behavior: Tensor
    weight: Tensor
    """Factor of the correction on the loss of each token; 0 removes the token."""
    advantages: Tensor
    mask: Tensor
    """bool: trainable tokens, including removed ones."""

    def __post_init__(self) -> None:
        shapes = {field.name: tuple(getattr(self, field.name).shape) for field in fields(self)}
        if len(set(shapes.values())) != 1:
            raise ValueError(f"the inputs of an objective must have one shape [rows, tokens], got {shapes}")
        if self.mask.dtype != torch.bool:
            raise ValueError(f"the mask is {self.mask.dtype}; it must be torch.bool")

    @property
    def usable(self) -> Tensor:
        """bool: trainable, not removed, and all log-probs finite. Other tokens have neither loss nor gradient."""
        finite = torch.isfinite(self.current) & torch.isfinite(self.proximal) & torch.isfinite(self.behavior)
        return self.mask & (self.weight > 0) & finite

    def without(self, removed: Tensor) -> "Inputs":
        """Return the inputs with these tokens (bool) removed from the loss. Mask and denominators do not change."""
        return replace(self, weight=masked_fill_zero(self.weight, ~removed))


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """Output of an objective: [rows, tokens] each."""

    losses: Tensor
    """Loss of each token before aggregation, with gradient, to be minimized; 0 where not usable."""
    clipped: dict[str, Tensor]
    """bool, by cause ("clip_high", "clip_low", "dual", "mask_high", "mask_low", "opsm", "ratio_bound"): the token has
    no gradient, or the factor on its gradient is bounded. A cause that does not apply to the objective has no key."""
    log_update: Tensor
    """Log of the ratio in the objective, detached; 0 where not usable."""

    @property
    def touched(self) -> Tensor:
        """bool: any cause applies."""
        return torch.stack([torch.zeros_like(self.losses, dtype=torch.bool), *self.clipped.values()]).any(0)

    def and_also(self, **causes: Tensor) -> "Outcome":
        """Return the outcome with additional causes: masks applied to the inputs before the objective (opsm)."""
        return replace(self, clipped={**self.clipped, **causes})


def masked_fill_zero(values: Tensor, where: Tensor) -> Tensor:
    """Return the values at `where` and 0 elsewhere, also where they are not finite."""
    return torch.where(where, values, torch.zeros((), device=where.device, dtype=values.dtype))


def beyond(ratio: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float) -> tuple[Tensor, Tensor]:
    """Return the tokens whose ratio is past the clip in the direction of their advantage: (too high, too low), bool.

    Too high: A > 0 and ratio > 1 + clip_high. Too low: A < 0 and ratio < 1 - clip_low. Raises ValueError for invalid
    bounds.
    """
    refuse_bounds(clip_low, clip_high)
    return (advantages > 0) & (ratio > 1 + clip_high), (advantages < 0) & (ratio < 1 - clip_low)


def refuse_bounds(clip_low: float, clip_high: float) -> None:
    """Raise ValueError unless [1 - clip_low, 1 + clip_high] is a range of ratios around 1."""
    if not 0 <= clip_low <= 1:
        raise ValueError(f"clip_low is {clip_low}; the lower bound is 1 - clip_low, so it must be in [0, 1]")
    if not clip_high >= 0:
        raise ValueError(f"clip_high is {clip_high}; the upper bound is 1 + clip_high, so it must be at least 0")
