"""The slope of a value against staleness, in one batch and over several batches. Pure.

Batches of different versions differ for other reasons than staleness. So tokens of different batches are never pooled:
the slope compares staler tokens with fresher tokens of the same batch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Point:
    """The tokens of one staleness in one batch."""

    staleness: float
    tokens: float
    value: float
    """Mean value of the tokens."""


@dataclass(frozen=True, slots=True)
class StalenessSlope:
    """A slope over several versions."""

    slope: float
    """Change of the value with each version of staleness."""
    errors: float
    """The slope divided by its standard error, which is estimated from the versions; infinite if they do not differ."""
    level: float
    """Mean value."""
    versions: int
    """Number of versions with enough points."""


def slope(points: Sequence[Point]) -> float | None:
    """Return the least-squares slope, weighted by tokens; None with fewer than two values of staleness."""
    found = _sums(points)
    return found[0] / found[1] if found is not None else None


def fit_staleness_slope(batches: Sequence[Sequence[Point]], *, least_tokens: float = 0.0) -> StalenessSlope | None:
    """Fit one slope within the batches, with equal weight for each batch; None if no batch has enough points.

    Points with fewer than `least_tokens` tokens are left out. A batch needs two points with different staleness.
    """
    fitted = []
    for points in batches:
        enough = [point for point in points if point.tokens >= least_tokens]
        if (sums := _sums(enough)) is not None:
            fitted.append(sums)
    if not fitted:
        return None
    variance = sum(sums[1] for sums in fitted)
    rise = sum(sums[0] for sums in fitted) / variance
    # the samples are the versions: tokens of a trajectory are not independent
    scatter = math.sqrt(sum((sums[0] - rise * sums[1]) ** 2 for sums in fitted))
    error = math.inf if len(fitted) < 2 else scatter * math.sqrt(len(fitted) / (len(fitted) - 1)) / variance
    level = sum(sums[2] for sums in fitted) / len(fitted)
    return StalenessSlope(
        rise, rise / error if error else math.copysign(math.inf, rise) if rise else 0.0, level, len(fitted)
    )


def _sums(points: Sequence[Point]) -> tuple[float, float, float] | None:
    """Covariance of staleness and value, variance of staleness, mean value, all weighted by tokens."""
    tokens = sum(point.tokens for point in points)
    if len({point.staleness for point in points if point.tokens}) < 2:
        return None
    middle = sum(point.tokens * point.staleness for point in points) / tokens
    mean = sum(point.tokens * point.value for point in points) / tokens
    covariance = sum(point.tokens * (point.staleness - middle) * (point.value - mean) for point in points)
    variance = sum(point.tokens * (point.staleness - middle) ** 2 for point in points)
    return covariance / tokens, variance / tokens, mean
