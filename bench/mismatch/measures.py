"""What the tokens of a run say, and how sure a handful of seeds is."""

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
    """A mean and its 95 % bootstrap interval; None where there is no number."""

    mean: float | None
    low: float | None
    high: float | None


NOTHING = Interval(None, None, None)


@dataclass(frozen=True, slots=True)
class Part:
    """Trainable tokens as one reference sees them; arrays are [tokens]."""

    tokens: AuditedTokens
    places: NDArray[np.int64]
    """Where in its row a token stands."""
    masked: NDArray[np.bool_]
    clipped: NDArray[np.bool_]
    first: bool
    """Whether they are of a version's first minibatch."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What a run's tokens say about one reference."""

    mask_slope: float
    """Of the share of masked tokens, for each version of staleness."""
    mask_slope_at_place: float
    """The same among tokens that stand at one place of the answer: early ones are older on average."""
    clip_slope: float
    clip_first_minibatch: float
    """Share of clipped tokens there."""
    leak: float
    """Mean |reference - old|, nats."""
    leak_rms: float
    discrepancy_correlation: float | None
    """Of the log-discrepancy seen with the true one; None where what is seen does not vary."""
    mask_by_staleness: list[float]
    clip_by_staleness: list[float]


@dataclass(frozen=True, slots=True)
class Gathered:
    """Parts of a run, one after another."""

    parts: list[Part] = field(default_factory=list)

    def seen(self) -> Seen:
        """What they say together. Raises ValueError for no parts."""
        if not self.parts:
            raise ValueError("no tokens were gathered: the run has to have more versions than its window")
        tokens = AuditedTokens.joined([part.tokens for part in self.parts])
        masked = np.concatenate([part.masked for part in self.parts])
        clipped = np.concatenate([part.clipped for part in self.parts])
        places = np.concatenate([part.places for part in self.parts])
        at_first = np.concatenate([part.clipped for part in self.parts if part.first])
        leaked = surrogate_error(tokens, TRUTH)
        return Seen(
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
    """Of the straight line of least squares; 0 when `over` is constant.

    >>> round(slope(np.array([0.0, 0.1, 0.2]), np.array([0, 1, 2])), 9)
    0.1
    """
    centered = over.astype(np.float64) - over.mean()
    spread = float(centered @ centered)
    return float(centered @ values.astype(np.float64)) / spread if spread else 0.0


def less_group_mean(values: NDArray[np.generic], groups: NDArray[np.int64]) -> Array:
    """Each value less the mean of its group.

    >>> less_group_mean(np.array([1.0, 3.0, 7.0]), np.array([0, 0, 2])).tolist()
    [-1.0, 1.0, 0.0]
    """
    numbers = values.astype(np.float64)
    means: Array = np.bincount(groups, weights=numbers) / np.bincount(groups).clip(min=1)
    return numbers - means[groups]


def by_staleness(values: NDArray[np.generic], staleness: NDArray[np.generic]) -> list[float]:
    """Mean of the values at staleness 0, 1, ...; each up to the greatest has to be there.

    >>> by_staleness(np.array([True, False, True]), np.array([0, 0, 1]))
    [0.5, 1.0]
    """
    places = staleness.astype(np.int64)
    means: Array = np.bincount(places, weights=values.astype(np.float64)) / np.bincount(places)
    return [float(mean) for mean in means]


def bootstrap(values: Sequence[float | None], *, resamples: int = RESAMPLES) -> Interval:
    """Mean over seeds and its 95 % percentile interval, seeds drawn with replacement.

    For two methods give the differences of the same seeds: the draws are then paired. Of few seeds (five have 126
    different draws) the interval is rather too narrow. None among the values: there is no interval.
    """
    numbers = np.array([value for value in values if value is not None], dtype=np.float64)
    if not len(numbers) or len(numbers) < len(values):
        return NOTHING
    draws = np.random.default_rng(0).integers(0, len(numbers), (resamples, len(numbers)))
    low, high = np.quantile(numbers[draws].mean(axis=1), [0.025, 0.975])
    return Interval(float(numbers.mean()), float(low), float(high))
