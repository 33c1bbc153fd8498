"""Exact divergences of distributions and estimates from one sample, in float64 numpy (algorithms.md 9)."""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def softmax(logits: Array) -> Array:
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


def kl(q: Array, p: Array) -> float:
    """KL(q || p)."""
    return float((q * np.log(q / p)).sum())


def kl_gradient(logits: Array, reference: Array) -> Array:
    """Gradient of KL(softmax(logits) || reference) with respect to the logits."""
    q = softmax(logits)
    apart = np.log(q / reference)
    return q * (apart - (q * apart).sum())


def estimate(q: float, p: float, name: str) -> float:
    """Estimate of KL(q || p) from the probabilities of one sample of q."""
    ratio = p / q
    return {"k1": -np.log(ratio), "k2": np.log(ratio) ** 2 / 2, "k3": ratio - 1 - np.log(ratio)}[name]
