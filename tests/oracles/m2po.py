"""M2PO in float64 numpy, one token at a time, by trying every threshold (docs/algorithms/m2po.md)."""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def tau(deltas: Array, advantages: Array, budget: float) -> float:
    """Largest |Delta| of a harmful token whose clipped second moment is within the budget; 0 without any."""
    harmful = [d for d, a in zip(deltas, advantages, strict=True) if (a > 0 and d > 0) or (a < 0 and d < 0)]
    fitting = [0.0]
    for candidate in harmful:
        clipped = [min(d * d, candidate * candidate) for d in harmful]
        if sum(clipped) <= budget * len(harmful):
            fitting.append(abs(candidate))
    return max(fitting)


def loss_and_slope(delta: float, advantage: float, width: float) -> tuple[float, float]:
    """Loss of a token and its derivative by the current log-prob, with the least bounds 0.7 and 1.5."""
    low, high, r = min(np.exp(-width), 0.7), max(np.exp(width), 1.5), np.exp(delta)
    if (advantage > 0 and r > high) or (advantage < 0 and r < low):
        return -(high if advantage > 0 else low) * advantage, 0.0
    return -r * advantage, -r * advantage
