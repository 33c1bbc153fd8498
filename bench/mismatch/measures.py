"""Statistics over the tokens of a run, and intervals over seeds."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from palimpsest.services.learner.observability.surrogate_error import AuditedTokens, Thresholds, surrogate_error

Array = NDArray[np.float64]
RESAMPLES = 10_000
TRUTH = Thresholds(band=None, clip_low=None, clip_high=None)


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean and its 95 % bootstrap interval. None if a value is missing."""

    mean: float | None
    low: float | None
    high: float | None


NOTHING = Interval(None, None, None)


@dataclass(frozen=True, slots=True)
class Part:
    """Trainable tokens under one reference. Arrays are [tokens]."""

    tokens: AuditedTokens
    places: NDArray[np.int64]
    """Position of the token in its row."""
    masked: NDArray[np.bool_]
    clipped: NDArray[np.bool_]
    first: bool
    """Whether the tokens belong to the first minibatch of a version."""


@dataclass(frozen=True, slots=True)
class TokenStatistics:
    """Statistics of one reference over the tokens of a run."""

    mask_slope: float
    """Change of the share of masked tokens per version of staleness."""
    mask_slope_at_place: float
    """The same at a fixed position of the answer, because early tokens are older on average."""
    clip_slope: float
    clip_first_minibatch: float
    """Share of clipped tokens in first minibatches."""
    leak: float
    """Mean |reference - old|, nats."""
    leak_rms: float
    discrepancy_correlation: float | None
    """Correlation of log proximal / behavior with the true log-discrepancy. None if the former is constant."""
    mask_by_staleness: list[float]
    clip_by_staleness: list[float]


@dataclass(frozen=True, slots=True)
class RunTokens:
    """Parts of a run, in order."""

    parts: list[Part] = field(default_factory=list)

    def statistics(self) -> TokenStatistics:
        """Return the statistics over all parts. Raises ValueError without parts."""
        if not self.parts:
            raise ValueError("no tokens were collected: the run needs more versions than its window")
        tokens = AuditedTokens.joined([part.tokens for part in self.parts])
        masked = np.concatenate([part.masked for part in self.parts])
        clipped = np.concatenate([part.clipped for part in self.parts])
        places = np.concatenate([part.places for part in self.parts])
        at_first = np.concatenate([part.clipped for part in self.parts if part.first])
        leaked = surrogate_error(tokens, TRUTH)
        return TokenStatistics(
            mask_slope=slope(masked, tokens.staleness),
            mask_slope_at_place=slope(less_group_mean(masked, places), less_group_mean(tokens.staleness, places)),
            clip_slope=slope(clipped, tokens.staleness),
            clip_first_minibatch=float(at_first.mean()),
            leak=float(np.abs(tokens.surrogate.astype(np.float64) - tokens.old).mean()),
            leak_rms=leaked["leak_rms"],
            discrepancy_correlation=None if np.isnan(leaked["correlation"]) else leaked["correlation"],
            mask_by_staleness=by_staleness(masked, tokens.staleness),
            clip_by_staleness=by_staleness(clipped, tokens.staleness),
        )


def slope(values: NDArray[np.generic], over: NDArray[np.generic]) -> float:
    """Return the slope of the least-squares line; 0 if `over` is constant.

    >>> round(slope(np.array([0.0, 0.1, 0.2]), np.array([0, 1, 2])), 9)
    0.1
    """
    centered = over.astype(np.float64) - over.mean()
    spread = float(centered @ centered)
    return float(centered @ values.astype(np.float64)) / spread if spread else 0.0


def less_group_mean(values: NDArray[np.generic], groups: NDArray[np.int64]) -> Array:
    """Return each value minus the mean of its group.

    >>> less_group_mean(np.array([1.0, 3.0, 7.0]), np.array([0, 0, 2])).tolist()
    [-1.0, 1.0, 0.0]
    """
    numbers = values.astype(np.float64)
    means: Array = np.bincount(groups, weights=numbers) / np.bincount(groups).clip(min=1)
    return numbers - means[groups]


def by_staleness(values: NDArray[np.generic], staleness: NDArray[np.generic]) -> list[float]:
    """Return the mean of the values at staleness 0, 1, ... Every staleness up to the maximum must occur.

    >>> by_staleness(np.array([True, False, True]), np.array([0, 0, 1]))
    [0.5, 1.0]
    """
    places = staleness.astype(np.int64)
    means: Array = np.bincount(places, weights=values.astype(np.float64)) / np.bincount(places)
    return [float(mean) for mean in means]


def bootstrap(values: Sequence[float | None], *, resamples: int = RESAMPLES) -> Interval:
    """Return the mean over seeds and its 95 % percentile interval, with seeds drawn with replacement.

    To compare two methods, pass the differences by seed: the draws are then paired. With few seeds (five have 126
    different draws) the interval is too narrow. If a value is None, all fields are None.
    """
    numbers = np.array([value for value in values if value is not None], dtype=np.float64)
    if not len(numbers) or len(numbers) < len(values):
        return NOTHING
    draws = np.random.default_rng(0).integers(0, len(numbers), (resamples, len(numbers)))
    low, high = np.quantile(numbers[draws].mean(axis=1), [0.025, 0.975])
    return Interval(float(numbers.mean()), float(low), float(high))
