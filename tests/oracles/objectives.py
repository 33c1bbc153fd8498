"""Objectives token by token in float64 numpy, with the gradient derived by hand.

algorithms.md 5 (clip, dual clip, CISPO, unclipped), 6 (OPSM), 7 (GSPO), 12 (R2VPO), 13 (EPO), 14 (MiniRL). Each returns
the losses [rows, tokens] and the gradient of their sum with respect to the current log-probs.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tests.oracles.sequence_rules import unbroken

Array = NDArray[np.float64]
Result = tuple[Array, Array]


@dataclass
class Data:
    """Inputs of an objective, each [rows, tokens]."""

    current: Array
    proximal: Array
    behavior: Array
    weight: Array
    advantages: Array
    mask: NDArray[np.bool_]

    def kept(self) -> Iterator[tuple[int, int]]:
        """Indices of the tokens that count: trainable, weighted and finite."""
        for i, t in np.ndindex(self.mask.shape):
            numbers = (self.current[i, t], self.proximal[i, t], self.behavior[i, t])
            if self.mask[i, t] and self.weight[i, t] > 0 and all(np.isfinite(numbers)):
                yield i, t

    def update(self, i: int, t: int) -> float:
        """pi_theta / pi_prox."""
        return float(np.exp(np.clip(self.current[i, t] - self.proximal[i, t], -20, 20)))

    def total(self, i: int, t: int) -> float:
        """pi_theta / mu."""
        return float(np.exp(np.clip(self.current[i, t] - self.behavior[i, t], -20, 20)))


def ppo(data: Data, *, low: float, high: float, dual: float | None = None) -> Result:
    loss, gradient = np.zeros_like(data.current), np.zeros_like(data.current)
    for i, t in data.kept():
        r, a, w = data.update(i, t), data.advantages[i, t], data.weight[i, t]
        value, slope = r * a, r * a
        bounded = float(np.clip(r, 1 - low, 1 + high)) * a
        if bounded < value:
            value, slope = bounded, 0.0
        if dual is not None and a < 0 and dual * a > value:
            value, slope = dual * a, 0.0
        loss[i, t], gradient[i, t] = -w * value, -w * slope
    return loss, gradient


def policy_gradient(data: Data) -> Result:
    loss = np.zeros_like(data.current)
    for i, t in data.kept():
        loss[i, t] = -data.weight[i, t] * data.update(i, t) * data.advantages[i, t]
    return loss, loss.copy()


def trajectory_ratio(data: Data, i: int) -> float:
    """Geometric mean of the ratios of row i."""
    logs = [np.clip(data.current[i, t] - data.proximal[i, t], -20, 20) for j, t in data.kept() if j == i]
    return float(np.exp(np.mean(logs)))


def gspo(data: Data, *, low: float, high: float) -> Result:
    loss, gradient = np.zeros_like(data.current), np.zeros_like(data.current)
    for i, t in data.kept():
        s, a, w = trajectory_ratio(data, i), data.advantages[i, t], data.weight[i, t]
        bounded = float(np.clip(s, 1 - low, 1 + high)) * a
        loss[i, t] = -w * min(s * a, bounded)
        gradient[i, t] = -w * s * a if s * a <= bounded else 0.0
    return loss, gradient


def cispo(data: Data, *, low: float, high: float) -> Result:
    loss, gradient = np.zeros_like(data.current), np.zeros_like(data.current)
    for i, t in data.kept():
        factor = float(np.clip(data.update(i, t), 1 - low, 1 + high))
        gradient[i, t] = -data.weight[i, t] * factor * data.advantages[i, t]
        loss[i, t] = gradient[i, t] * data.current[i, t]
    return loss, gradient


def minirl(data: Data, *, low: float, high: float) -> Result:
    loss, gradient = np.zeros_like(data.current), np.zeros_like(data.current)
    for i, t in data.kept():
        r, a = data.update(i, t), data.advantages[i, t]
        if (a > 0 and r > 1 + high) or (a < 0 and r < 1 - low):
            continue
        gradient[i, t] = -data.total(i, t) * a
        loss[i, t] = gradient[i, t] * data.current[i, t]
    return loss, gradient


def r2vpo(data: Data, *, multiplier: float, target: float) -> Result:
    loss, gradient = np.zeros_like(data.current), np.zeros_like(data.current)
    for i, t in data.kept():
        r, a, w = data.update(i, t), data.advantages[i, t], data.weight[i, t]
        loss[i, t] = -w * (r * a - multiplier * ((r - 1) ** 2 - target))
        gradient[i, t] = -w * r * (a - 2 * multiplier * (r - 1))
    return loss, gradient


def opsm(data: Data, *, threshold: float) -> NDArray[np.bool_]:
    """Mask of the removed tokens."""
    removed = np.zeros_like(data.mask)
    for i, t in data.kept():
        places = [place for row, place in data.kept() if row == i]
        moved = np.mean([data.behavior[i, place] - data.current[i, place] for place in places])
        if data.advantages[i, t] < 0 and moved > threshold:
            removed[i, t] = True
    return removed


def epo(
    entropy: Array, mask: NDArray[np.bool_], *, history: float, low: float, high: float, weight: float
) -> tuple[float, Array]:
    """Mean over trajectories of the mean hinge over turns, and its gradient with respect to the entropies."""
    rows = [i for i in range(len(mask)) if mask[i].any()]
    loss, gradient = 0.0, np.zeros_like(entropy)
    for i in rows:
        turns = unbroken(mask[i])
        share = weight / len(rows) / len(turns)
        for places in turns:
            mean = float(np.mean(entropy[i][places]))
            if mean < low * history:
                loss += share * (low * history - mean)
                gradient[i][places] = -share / len(places)
            elif mean > high * history:
                loss += share * (mean - high * history)
                gradient[i][places] = share / len(places)
    return loss, gradient
