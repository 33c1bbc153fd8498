"""How a number rises with staleness: in one batch, and over several, each judged within itself. Pure.

Tokens of different staleness stem from different parts of a run, which differ for other reasons. So versions are never
thrown together: what counts is how much staler tokens differ from fresher ones of the same batch.
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
    """Their mean."""


@dataclass(frozen=True, slots=True)
class StalenessSlope:
    """Over several versions."""

    slope: float
    """Change of the value with each version of staleness."""
    errors: float
    """The slope in its standard errors, which come from how much the versions differ; infinite when they do not."""
    level: float
    """Mean value."""
    versions: int
    """That could be judged."""


def slope(points: Sequence[Point]) -> float | None:
    """Least squares, weighted by tokens; None with fewer than two values of staleness."""
    found = _sums(points)
    return found[0] / found[1] if found is not None else None


def fit_staleness_slope(batches: Sequence[Sequence[Point]], *, least_tokens: float = 0.0) -> StalenessSlope | None:
    """Within the batches, every batch counting alike; None when none could be judged.

    Points of fewer than `least_tokens` tokens are left out; a batch that has not two left says nothing.
    """
    judged = []
    for points in batches:
        enough = [point for point in points if point.tokens >= least_tokens]
        if (sums := _sums(enough)) is not None:
            judged.append(sums)
    if not judged:
        return None
    variance = sum(part[1] for part in judged)
    found = sum(part[0] for part in judged) / variance
    # versions are the independent ones, tokens are not: those of a trajectory resemble each other
    scatter = math.sqrt(sum((part[0] - found * part[1]) ** 2 for part in judged))
    error = math.inf if len(judged) < 2 else scatter * math.sqrt(len(judged) / (len(judged) - 1)) / variance
    level = sum(part[2] for part in judged) / len(judged)
    return StalenessSlope(
        found, found / error if error else math.copysign(math.inf, found) if found else 0.0, level, len(judged)
    )


def _sums(points: Sequence[Point]) -> tuple[float, float, float] | None:
    """Covariance of staleness and value, variance of staleness, mean value, all weighted by tokens."""
    tokens = sum(point.tokens for point in points)
    if len({point.staleness for point in points if point.tokens}) < 2:
        return None
    middle = sum(point.tokens * point.staleness for point in points) / tokens
    mean = sum(point.tokens * point.value for point in points) / tokens
    together = sum(point.tokens * (point.staleness - middle) * (point.value - mean) for point in points)
    alone = sum(point.tokens * (point.staleness - middle) ** 2 for point in points)
    return together / tokens, alone / tokens, mean
