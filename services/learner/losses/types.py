"""What an objective takes and what it gives. Pure.

An objective says what each token adds to the loss; aggregate.py says what the sum is divided by.
"""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """One micro-batch: [rows, tokens] each, log-probs in nats. Only `current` carries a gradient.

    Raises ValueError when shapes differ or the mask is not boolean (an integer mask is negated bit by bit).
    """

    current: Tensor
    proximal: Tensor
    behavior: Tensor
    weight: Tensor
    """The correction's factor on each token's loss; 0 removes the token."""
    advantages: Tensor
    mask: Tensor
    """bool: trainable tokens, whatever is removed of them."""

    def __post_init__(self) -> None:
        shapes = {field.name: tuple(getattr(self, field.name).shape) for field in fields(self)}
        if len(set(shapes.values())) != 1:
            raise ValueError(f"inputs of an objective have one shape [rows, tokens], here they have {shapes}")
        if self.mask.dtype != torch.bool:
            raise ValueError(f"the mask is {self.mask.dtype}: make it torch.bool")

    @property
    def usable(self) -> Tensor:
        """bool: trainable, not removed, and every log-prob finite. No other token has a loss or a gradient."""
        finite = torch.isfinite(self.current) & torch.isfinite(self.proximal) & torch.isfinite(self.behavior)
        return self.mask & (self.weight > 0) & finite

    def without(self, removed: Tensor) -> "Inputs":
        """The same with these tokens (bool) removed from the loss; the mask, and so every denominator, stays."""
        return replace(self, weight=masked_fill_zero(self.weight, ~removed))


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """What became of the tokens: [rows, tokens] each."""

    losses: Tensor
    """With gradient, to be made small; 0 where not usable; not divided by anything yet."""
    clipped: dict[str, Tensor]
    """bool, by cause ("clip_high", "clip_low", "dual", "mask_high", "mask_low", "opsm"): the token lost its gradient,
    or what multiplies the gradient was bounded. Causes that the objective does not know have no key."""
    log_update: Tensor
    """log of the ratio that the objective is made of, detached; 0 where not usable."""

    @property
    def touched(self) -> Tensor:
        """bool: any of the causes."""
        return torch.stack([torch.zeros_like(self.losses, dtype=torch.bool), *self.clipped.values()]).any(0)

    def and_also(self, **causes: Tensor) -> "Outcome":
        """The same with further causes: masks that were taken off the inputs before (opsm)."""
        return replace(self, clipped={**self.clipped, **causes})


def masked_fill_zero(values: Tensor, where: Tensor) -> Tensor:
    """The values there, 0 elsewhere (also where they are not finite)."""
    return torch.where(where, values, torch.zeros((), device=where.device, dtype=values.dtype))


def beyond(ratio: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float) -> tuple[Tensor, Tensor]:
    """Where the ratio has gone the way its advantage pulls, past the clip: (too high, too low), bool.

    Too high: A > 0 and ratio > 1 + clip_high. Too low: A < 0 and ratio < 1 - clip_low. Raises ValueError for bounds
    that are none.
    """
    refuse_bounds(clip_low, clip_high)
    return (advantages > 0) & (ratio > 1 + clip_high), (advantages < 0) & (ratio < 1 - clip_low)


def refuse_bounds(clip_low: float, clip_high: float) -> None:
    """Raise ValueError unless 1 - clip_low and 1 + clip_high are bounds of a ratio around 1."""
    if not 0 <= clip_low <= 1:
        raise ValueError(f"clip_low is {clip_low}: the ratio's lower bound is 1 - clip_low, give 0 to 1")
    if not clip_high >= 0:
        raise ValueError(f"clip_high is {clip_high}: the ratio's upper bound is 1 + clip_high, give 0 or more")
