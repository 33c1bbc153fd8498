"""Whitening: mean 0 and deviation 1 over all trainable tokens of the batch on all ranks. Pure.

Each rank computes the moments of its tokens. All ranks merge all moments and apply the same mean and deviation. A mean
of the ranks' means would be wrong where ranks hold different numbers of tokens.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from palimpsest.services.learner.advantages.trainable_tokens import Array, Floats, Mask, check_mask, trainable

EPSILON = 1e-8
"""Added to the variance, so that rounding noise is not scaled to a signal."""


@dataclass(frozen=True, slots=True)
class Moments:
    """Moments of one rank's tokens."""

    count: int
    mean: float
    squares: float
    """Sum of squared distances from the mean."""
    low: float
    high: float

    @classmethod
    def of(cls, values: Array) -> "Moments":
        """Return the moments of the values. Without values: 0 each, with low above high."""
        if not values.size:
            return cls(0, 0.0, 0.0, math.inf, -math.inf)
        mean = float(values.mean())
        squares = float(((values - mean) ** 2).sum())
        return cls(values.size, mean, squares, float(values.min()), float(values.max()))


def merged(parts: Sequence[Moments]) -> Moments:
    """Return the moments of all parts together, without a difference of large squares, which would lose precision."""
    count = sum(part.count for part in parts)
    if not count:
        return Moments.of(np.zeros(0))
    mean = sum(part.count * part.mean for part in parts) / count
    return Moments(
        count=count,
        mean=mean,
        squares=sum(part.squares + part.count * (part.mean - mean) ** 2 for part in parts),
        low=min(part.low for part in parts),
        high=max(part.high for part in parts),
    )


def whitened(parts: Sequence[tuple[Floats, Mask]], *, gather: Callable[[Moments], list[Moments]]) -> list[Array]:
    """Return (x - mean) / sqrt(var + 1e-8) over the trainable tokens of all parts of all ranks, var unbiased. float64.

    parts: values and mask of each micro-batch of this rank, [rows, tokens] each; untrainable tokens become 0. gather:
    returns the values of all ranks. All ranks call this function, a rank without micro-batches with no parts. Equal
    values become exactly 0. Raises ValueError for a value that is not finite.
    """
    for _, mask in parts:
        check_mask(mask)
    chosen = [trainable("values", values, mask) for values, mask in parts]
    whole = merged(gather(Moments.of(np.concatenate([np.zeros(0), *chosen]))))
    if whole.low >= whole.high:
        return [np.zeros(mask.shape) for _, mask in parts]
    scale = 1.0 / math.sqrt(whole.squares / (whole.count - 1) + EPSILON)
    return [np.where(mask, (np.where(mask, values, 0.0) - whole.mean) * scale, 0.0) for values, mask in parts]
