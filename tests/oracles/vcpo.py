"""Effective sample size and minimum-variance baseline in float64 numpy (algorithms.md 11)."""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def ess_share(weights: Array) -> float:
    return float(weights.sum() ** 2 / (weights**2).sum() / len(weights))


def factor(share: float, base: float, power: float) -> float:
    return min(1.0, share / base) ** power


def estimator(weights: Array, gradients: Array, rewards: Array, baseline: float) -> Array:
    """Contribution of each trajectory to the gradient, [trajectories, parameters]."""
    return (weights * (rewards - baseline))[:, None] * gradients


def variance(weights: Array, gradients: Array, rewards: Array, baseline: float) -> float:
    """Variance of the contributions, summed over the parameters."""
    return float(estimator(weights, gradients, rewards, baseline).var(axis=0).sum())


def baseline(weights: Array, squared_norms: Array, rewards: Array) -> float:
    importance = weights**2 * squared_norms
    return float((importance * rewards).sum() / importance.sum())
