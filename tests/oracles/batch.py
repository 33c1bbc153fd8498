"""Metrics of a batch's tokens in float64, counted token by token from the formulas."""

import math
from collections.abc import Sequence

import numpy as np

EDGES = [-2, -1, -0.5, -0.2, -0.1, -0.05, -0.02, -0.01, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2]


def bins(values: Sequence[float]) -> list[int]:
    """Counts below the first edge, between edges, and from the last edge; an edge belongs to the bin above it."""
    counts = [0] * (len(EDGES) + 1)
    for value in values:
        counts[sum(value >= edge for edge in EDGES)] += 1
    return counts


def quantile(values: Sequence[float], share: float) -> float:
    """Quantile by linear interpolation between the two neighboring values."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def line(xs: Sequence[float], ys: Sequence[float]) -> float | None:
    """Least-squares slope through single points; None if all xs are equal."""
    if len(set(xs)) < 2:
        return None
    return float(np.polyfit(np.array(xs, dtype=np.float64), np.array(ys, dtype=np.float64), 1)[0])


def ess(weights: Sequence[float]) -> float:
    """Effective sample share (sum w)^2 / (N sum w^2)."""
    return math.fsum(weights) ** 2 / math.fsum(w * w for w in weights) / len(weights)


def removal(causes: dict[str, list[bool]]) -> dict[str, object]:
    """Removal counts from the number of causes per token."""
    count = len(next(iter(causes.values())))
    times = [sum(gone[i] for gone in causes.values()) for i in range(count)]
    return {
        "removed": sum(t > 0 for t in times),
        "overlap": sum(t > 1 for t in times),
        "repeats": sum(max(0, t - 1) for t in times),
        "causes": {
            name: [sum(gone), sum(gone[i] and times[i] == 1 for i in range(count))] for name, gone in causes.items()
        },
    }


def divergences(proximal: Sequence[float], behavior: Sequence[float], current: Sequence[float]) -> dict[str, float]:
    """Means over the tokens; all must be finite with ratios that need no clamp."""
    x = [p - b for p, b in zip(proximal, behavior, strict=True)]
    y = [c - p for c, p in zip(current, proximal, strict=True)]
    unsure = [i for i, b in enumerate(behavior) if b < -1e-3]
    n = len(x)
    return {
        "discrepancy_k1": sum(-v for v in x) / n,
        "discrepancy_k2": sum(v * v for v in x) / 2 / n,
        "staleness_k1": sum(-v for v in y) / n,
        "staleness_k3": sum(math.exp(v) - 1 - v for v in y) / n,
        "difference_max": max(abs(math.exp(p) - math.exp(b)) for p, b in zip(proximal, behavior, strict=True)),
        "correlation": float(np.corrcoef(proximal, behavior)[0, 1]),
        "unsure": len(unsure),
        "same": sum(x[i] == 0 for i in unsure) / len(unsure),
    }
