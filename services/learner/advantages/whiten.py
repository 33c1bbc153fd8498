"""Mean 0 and deviation 1 over all trainable tokens of the batch, wherever they are. Pure.

Every rank adds up its own tokens, all ranks hear all sums, and then each applies the same two numbers to its share. A
mean of ranks' means would be another number as soon as one holds fewer tokens.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from palimpsest.services.learner.advantages.trainable_tokens import Array, Floats, Mask, check_mask, trainable

EPSILON = 1e-8
"""Added to the variance: rounding noise in place of a signal stays small."""


@dataclass(frozen=True, slots=True)
class Moments:
    """Of one rank's tokens."""

    count: int
    mean: float
    squares: float
    """Sum of squared distances from the mean."""
    low: float
    high: float

    @classmethod
    def of(cls, values: Array) -> "Moments":
        """Of these values, in whatever order. Of none: 0 each, with low above high."""
        if not values.size:
            return cls(0, 0.0, 0.0, math.inf, -math.inf)
        mean = float(values.mean())
        squares = float(((values - mean) ** 2).sum())
        return cls(values.size, mean, squares, float(values.min()), float(values.max()))


def merged(parts: Sequence[Moments]) -> Moments:
    """Of all parts' values together. Without a difference of large squares, which would lose the variance."""
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
    """(x - mean) / sqrt(var + 1e-8) over the trainable tokens of all parts of all ranks, var unbiased. float64

    parts: values and mask of each micro-batch of this rank, [rows, tokens] both; untrainable tokens become 0. gather:
    every rank's value, on every rank (`ProcessGroup.gather`), so all ranks call this, with no parts if they have none.
    Equal values become exactly 0. Raises ValueError for a value that is not finite.
    """
    for _, mask in parts:
        check_mask(mask)
    chosen = [trainable("values", values, mask) for values, mask in parts]
    whole = merged(gather(Moments.of(np.concatenate([np.zeros(0), *chosen]))))
    if whole.low >= whole.high:
        return [np.zeros(mask.shape) for _, mask in parts]
    scale = 1.0 / math.sqrt(whole.squares / (whole.count - 1) + EPSILON)
    return [np.where(mask, (np.where(mask, values, 0.0) - whole.mean) * scale, 0.0) for values, mask in parts]
