"""Surrogates, their bands on the total ratio, moving averages and errors (algorithms.md 2.2, 2.3, 4.5 to 4.7)."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def loglinear(behavior: Array, current: Array, staleness: NDArray[np.int64]) -> Array:
    """Log of mu^(1/d) pi_theta^(1 - 1/d) for staleness d; staleness 0 counts as 1."""
    on_behavior = 1.0 / np.maximum(staleness, 1)
    return on_behavior * behavior + (1.0 - on_behavior) * current


def linear(behavior: Array, current: Array, alpha: float) -> Array:
    """Log of alpha mu + (1 - alpha) pi_theta."""
    return np.log(alpha * np.exp(behavior) + (1.0 - alpha) * np.exp(current))


def loglinear_clip_band(staleness: int, *, low: float, high: float) -> tuple[float, float]:
    """Total ratios whose staleness ratio R^(1/d) is inside [1 - low, 1 + high]."""
    return (1 - low) ** staleness, (1 + high) ** staleness


def loglinear_mask_band(staleness: int, *, band: float) -> tuple[float, float]:
    """Total ratios whose discrepancy R^((d-1)/d) is inside [1/c, c]; all of them for d = 1."""
    if staleness == 1:
        return 0.0, np.inf
    power = staleness / (staleness - 1)
    return band**-power, band**power


def linear_clip_band(alpha: float, *, low: float, high: float) -> tuple[float, float]:
    """Total ratios whose R / (alpha + (1 - alpha) R) is inside [1 - low, 1 + high]."""
    beyond = 1 - (1 - alpha) * (1 + high)
    return alpha * (1 - low) / (1 - (1 - alpha) * (1 - low)), alpha * (1 + high) / beyond if beyond > 0 else np.inf


def averages(thetas: Sequence[Array], decays: Sequence[float]) -> tuple[list[Array], list[float], list[float]]:
    """Average, total weight and mean age after each version; decays[t] applies when thetas[t + 1] enters.

    Closed form: the weight of theta(k) at t is the product of decays[k] to decays[t - 1]. A reset is a decay of 0.
    """
    means, weights, ages = [], [], []
    for t in range(len(thetas)):
        shares = np.array([np.prod([decays[j] for j in range(k, t)]) for k in range(t + 1)])
        means.append(sum(share * theta for share, theta in zip(shares, thetas, strict=False)) / shares.sum())
        weights.append(float(shares.sum()))
        ages.append(float((shares * np.arange(t, -1, -1)).sum() / shares.sum()))
    return means, weights, ages


def center_of_mass(decay: float, versions: int) -> float:
    """Mean age of `versions` versions with a constant decay."""
    return decay / (1 - decay) - versions * decay**versions / (1 - decay**versions)


def paces(measured: Sequence[float]) -> list[float]:
    """beta at each tick: d / (1 + d) of the running mean d; each value holds for 3 d ticks."""
    betas, taken, at = [], 0.0, -1
    for t in range(len(measured)):
        shares = np.array([0.9 ** (t - k) for k in range(t + 1)])
        mean = float((shares * np.array(measured[: t + 1])).sum() / shares.sum())
        if t - at >= np.ceil(3 * taken):
            taken, at = mean, t
        betas.append(taken / (1 + taken))
    return betas


def resets(shares: Sequence[float], *, kind: str, threshold: float, patience: int, cooldown: int) -> list[int]:
    """Versions at which a moving average is reset."""
    if kind == "paper":
        return [t for t, share in enumerate(shares) if share < threshold]
    found: list[int] = []
    healthy: list[float] = []
    lows: list[bool] = []
    for t, share in enumerate(shares):
        low = bool(healthy) and share < threshold * float(np.median(healthy[:8]))
        lows.append(low)
        if not low:
            healthy.append(share)
        first = max(t - patience + 1, found[-1] + 1 if found else 0)
        row = t - first + 1 >= patience and all(lows[first : t + 1])
        if row and (not found or t - found[-1] > cooldown):
            found.append(t)
    return found


def leak(
    staleness: NDArray[np.int64],
    behavior: Array,
    surrogate: Array,
    old: Array,
    current: Array,
    advantages: Array,
    *,
    band: float,
    low: float,
    high: float,
) -> dict[int, dict[str, float]]:
    """Errors of a surrogate by staleness, counted token by token from the ratios."""

    def judged(proximal: float, i: int) -> tuple[bool, bool]:
        discrepancy, update = np.exp(proximal - behavior[i]), np.exp(current[i] - proximal)
        beyond = update > 1 + high if advantages[i] > 0 else advantages[i] < 0 and update < 1 - low
        return not 1 / band <= discrepancy <= band, bool(beyond)

    found: dict[int, dict[str, float]] = {}
    for d in sorted(set(staleness.tolist())):
        places = [i for i in range(len(staleness)) if staleness[i] == d]
        pairs = [(judged(surrogate[i], i), judged(old[i], i)) for i in places]
        leaked = [surrogate[i] - old[i] for i in places]
        n = len(places)
        found[d] = {
            "tokens": n,
            "leak_mean": sum(leaked) / n,
            "leak_rms": (sum(e * e for e in leaked) / n) ** 0.5,
            "masked_wrongly": sum(a[0] and not b[0] for a, b in pairs) / n,
            "kept_wrongly": sum(b[0] and not a[0] for a, b in pairs) / n,
            "clipped_wrongly": sum(a[1] and not b[1] for a, b in pairs) / n,
            "unclipped_wrongly": sum(b[1] and not a[1] for a, b in pairs) / n,
            "removed_wrongly": sum(any(a) and not any(b) for a, b in pairs) / n,
            "trained_wrongly": sum(any(b) and not any(a) for a, b in pairs) / n,
        }
    return found
