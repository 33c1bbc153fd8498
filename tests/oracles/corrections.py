"""Discrepancy rules for single tokens in float64 numpy, one token at a time (algorithms.md 5, 6 and 9)."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]


@dataclass
class Draw:
    """A random batch with untrainable, missing and nonfinite tokens; arrays [rows, tokens]."""

    proximal: Array
    behavior: Array
    mask: Mask
    missing: Mask

    @property
    def usable(self) -> Mask:
        """Trainable tokens with a finite ratio."""
        return self.mask & ~self.missing & np.isfinite(self.proximal) & np.isfinite(self.behavior)


def draw(seed: int, *, rows: int = 4, tokens: int = 12, spread: float = 0.5, broken: float = 0.1) -> Draw:
    """Random batch: log-ratios with deviation `spread`, eight times as large for a tenth of the trajectories."""
    generator = np.random.default_rng(seed)
    shape = (int(generator.integers(1, rows + 1)), int(generator.integers(1, tokens + 1)))
    behavior = -generator.exponential(1.5, shape)
    proximal = behavior + generator.normal(0, spread, shape) * np.where(generator.random((shape[0], 1)) < 0.1, 8, 1)
    for values in (behavior, proximal):
        bad = generator.random(shape) < broken / 2
        values[bad] = generator.choice([np.nan, np.inf, -np.inf], size=int(bad.sum()))
    return Draw(proximal, behavior, generator.random(shape) < 0.75, generator.random(shape) < broken)


def ratio(proximal: float, behavior: float) -> float:
    """r = pi_prox / mu, with its log clamped to +-20."""
    return float(np.exp(np.clip(proximal - behavior, -20.0, 20.0)))


def estimate(name: str, r: float) -> float:
    """Estimate k1, k2 or k3 of KL(mu || pi_prox) from the ratio at one sample of mu."""
    x = np.log(r)
    return float({"k1": -x, "k2": x * x / 2, "k3": r - 1.0 - x}[name])


def removed_tokens(data: Draw, rule: str, bound: float | tuple[float, float]) -> Mask:
    """Tokens that the rule removes; rule: band_high, band_low, tokens_high, tokens_low, difference, k1_token, ..."""
    removed = np.zeros(data.mask.shape, dtype=bool)
    for index in np.ndindex(removed.shape):
        if not data.usable[index]:
            continue
        proximal, behavior = float(data.proximal[index]), float(data.behavior[index])
        r = ratio(proximal, behavior)
        match rule:
            case "band_high":
                removed[index] = r > bound
            case "band_low":
                removed[index] = r < 1 / bound
            case "tokens_high":
                removed[index] = r > bound[1]
            case "tokens_low":
                removed[index] = r < bound[0]
            case "difference":
                removed[index] = abs(min(1.0, np.exp(proximal)) - min(1.0, np.exp(behavior))) > bound
            case "k1_token" | "k2_token" | "k3_token":
                removed[index] = estimate(rule[:2], r) > bound
            case _:
                raise AssertionError(rule)
    return removed


def token_weight(r: float, kind: str, low: float, high: float) -> float:
    """Weight of a kept token, before normalization."""
    return {"off": 1.0, "ratio": r, "truncated": min(r, high), "clipped": min(max(r, low), high)}[kind]


def m2_kept(squares: Array, bound: float) -> Mask:
    """Remove the largest value and its equals until the mean of the rest is below the bound or no value remains."""
    kept = np.ones(len(squares), dtype=bool)
    while kept.any() and squares[kept].mean() >= bound:
        kept &= squares != squares[kept].max()
    return kept
