"""Distributions of log-ratios: quantiles and a histogram over fixed bins, short enough for a line of JSON. Pure."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

EDGES = (-2.0, -1.0, -0.5, -0.2, -0.1, -0.05, -0.02, -0.01, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
"""Edges of the bins, nats. Bin i holds EDGES[i - 1] <= x < EDGES[i]; the first bin has no lower edge, the last no
upper."""
QUANTILES = (1, 5, 50, 95, 99, 100)
"""Quantiles in percent; the last is the maximum."""
GROUPS = ("0", "1", "2", "3-4", "5-8", ">8")
"""Groups of staleness, which keep the number of Prometheus series small."""


def summarize_distribution(log_ratios: NDArray[Any]) -> dict[str, Any] | None:
    """Return `mean_abs` (nats), `quantiles` (of QUANTILES, nats) and `bins` (counts); None without tokens.

    log_ratios: [tokens], finite, nats. Quantiles between two values are interpolated linearly.
    """
    if not len(log_ratios):
        return None
    indices = np.searchsorted(EDGES, log_ratios, side="right")
    return {
        "mean_abs": float(np.abs(log_ratios).mean()),
        "quantiles": np.percentile(log_ratios, QUANTILES).tolist(),
        "bins": np.bincount(indices, minlength=len(EDGES) + 1).tolist(),
    }


def group(staleness: int) -> str:
    """Return the group of GROUPS that a staleness belongs to.

    >>> [group(staleness) for staleness in (0, 2, 3, 4, 8, 9)]
    ['0', '2', '3-4', '3-4', '5-8', '>8']
    """
    if staleness <= 2:
        return str(staleness)
    return "3-4" if staleness <= 4 else "5-8" if staleness <= 8 else ">8"
