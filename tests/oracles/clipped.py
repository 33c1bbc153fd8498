"""The decoupled clipped objective in float64 numpy, from the formulas."""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def decoupled_clipped(
    current: Array,
    proximal: Array,
    behavior: Array,
    advantages: Array,
    mask: NDArray[np.bool_],
    *,
    low: float,
    high: float,
    band: float | None,
    weighted: bool,
) -> tuple[float, Array]:
    """Loss and its gradient with respect to `current`, token by token, denominator = trainable tokens.

    algorithms.md 2.1, 4.8, 5 and 6: w = exp(proximal - behavior) inside [1/band, band], else 0;
    L = -sum w min(r A, clip(r) A) / N.
    """
    loss, gradient = 0.0, np.zeros_like(current)
    count = max(1, int(mask.sum()))
    for index in np.ndindex(current.shape):
        if not mask[index]:
            continue
        log_discrepancy = float(np.clip(proximal[index] - behavior[index], -20, 20))
        if band is not None and abs(log_discrepancy) > np.log(band):
            continue
        weight = np.exp(log_discrepancy) if weighted else 1.0
        ratio = np.exp(np.clip(current[index] - proximal[index], -20, 20))
        advantage = advantages[index]
        unclipped = ratio * advantage
        clipped = np.clip(ratio, 1 - low, 1 + high) * advantage
        loss -= weight * min(unclipped, clipped) / count
        if unclipped <= clipped:
            gradient[index] = -weight * ratio * advantage / count
    return loss, gradient
