"""EPO: a hinge penalty that keeps the entropy of each turn near its history (docs/algorithms/epo.md). Pure.

    weight * phase * mean_i mean_s [ relu(low * H_history_s - H_is) + relu(H_is - high * H_history_s) ]

H_is is the mean entropy of the trainable tokens of turn s (environment step) of trajectory i. H_history_s is the mean
of that entropy over earlier versions.
"""

import math
from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from palimpsest.services.learner.corrections.sequence_rules import runs
from palimpsest.services.learner.losses.types import masked_fill_zero

TURNS = 64
"""Turns with an own history; later turns share the last one."""
WINDOW = 5
"""Versions in the history `window`."""
Turns = NDArray[np.float64]


def phase_weight(version: int, horizon: int, gamma: float) -> float:
    """Return the weight of the penalty at a version k, with the horizon K and h = floor(K / 2).

    1 - 0.2 (1 - e^(-2 k / h)) for k <= h, then 0.8 e^(-gamma (k - h) / (K - h)).

    >>> [round(phase_weight(version, 150, 3.0), 4) for version in (0, 75, 76, 150)]
    [1.0, 0.8271, 0.7686, 0.0398]
    """
    half = horizon // 2
    if version <= half:
        return 1.0 - 0.2 * (1.0 - math.exp(-2.0 * version / half))
    return 0.8 * math.exp(-gamma * (version - half) / (horizon - half))


class EntropyHistory:
    """Mean entropies of earlier versions, nats per token: over trajectories, and for each turn.

    >>> history = EntropyHistory()
    >>> history.mean is None
    True
    >>> history.add(1.0)
    >>> history.add(2.0)
    >>> history.mean
    1.5
    """

    def __init__(self) -> None:
        self._total, self._count = 0.0, 0.0
        self._turns = np.zeros((TURNS, 2))
        """Sum and number of the values of each turn."""
        self._newest = np.full((TURNS, WINDOW), np.nan)
        """Newest values of each turn, oldest first; NaN where there are fewer."""

    @property
    def mean(self) -> float | None:
        """Mean over trajectories and versions; None without a version."""
        return self._total / self._count if self._count else None

    def turns(self, kind: Literal["cumulative", "window"]) -> Turns:
        """H_history_s of each turn, [TURNS] float64: over all versions, or the newest 5; NaN for an unknown turn."""
        if kind == "cumulative":
            total, count = self._turns.T
        else:
            total, count = np.nansum(self._newest, axis=1), np.isfinite(self._newest).sum(axis=1)
        means: Turns = np.divide(total, count, out=np.full(TURNS, np.nan), where=count > 0)
        return means

    def add(self, entropy: float, turns: Turns | None = None) -> None:
        """Add a trained version: its mean over trajectories, and of each turn ([TURNS], NaN without a trajectory).

        Raises ValueError if the mean is NaN or infinite, which would stay in the history.
        """
        if not math.isfinite(entropy):
            raise ValueError(f"a version's mean entropy is {entropy}: leave versions without one out of the history")
        self._total += entropy
        self._count += 1
        if turns is not None:
            known = np.isfinite(turns)
            self._turns[known] += np.stack([turns[known], np.ones(int(known.sum()))], axis=1)
            self._newest[known] = np.concatenate([self._newest[known, 1:], turns[known, None]], axis=1)

    def state(self) -> dict[str, list[float]]:
        """Return the state for a checkpoint: `mean` (total, count) and `turns` (rows of TURNS * (2 + WINDOW))."""
        rows = np.concatenate([self._turns, self._newest], axis=1)
        return {"mean": [self._total, self._count], "turns": rows.ravel().tolist()}

    def restore(self, state: Mapping[str, list[float]]) -> None:
        """Restore a checkpoint. Without `turns`, the history of turns is empty: the next version has no penalty."""
        self._total, self._count = state["mean"]
        if "turns" in state:
            rows = np.asarray(state["turns"], dtype=np.float64).reshape(TURNS, 2 + WINDOW)
            self._turns, self._newest = rows[:, :2].copy(), rows[:, 2:].copy()


def turn_entropy(entropy: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return H_is, [rows, TURNS], 0 where a row has no such turn, and the existing turns, bool [rows, TURNS].

    entropy: [rows, tokens], nats; mask: bool, trainable tokens. A turn is an unbroken run of trainable tokens. A value
    that is not finite does not enter the mean.
    """
    usable = mask & torch.isfinite(entropy)
    places = runs(mask).clamp(min=0, max=TURNS - 1)
    shape = (len(mask), TURNS)
    sums = entropy.new_zeros(shape).scatter_add(1, places, masked_fill_zero(entropy, usable))
    counts = entropy.new_zeros(shape).scatter_add(1, places, usable.to(entropy.dtype))
    return sums / counts.clamp(min=1), counts > 0


def trajectory_entropy(entropy: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean entropy of each row, [rows], 0 where a row has none, and the rows that have one, bool [rows].

    entropy: [rows, tokens], nats; mask: bool, trainable tokens. A value that is not finite does not enter the mean.
    """
    usable = mask & torch.isfinite(entropy)
    count = usable.sum(-1)
    return masked_fill_zero(entropy, usable).sum(-1) / count.clamp(min=1), count > 0


def hinge(entropy: Tensor, history: Tensor | float, *, low: float, high: float) -> Tensor:
    """Return the distance of each entropy from [low * history, high * history], nats; no gradient inside."""
    return torch.relu(low * history - entropy) + torch.relu(entropy - high * history)


def epo_loss(
    entropy: Tensor, mask: Tensor, *, history: Turns, low: float, high: float, weight: float, sequences: int
) -> Tensor:
    """Return this micro-batch's share of the penalty, a scalar with gradient; shares add up like those of `aggregate`.

    entropy: [rows, tokens] with gradient, nats; mask: bool, trainable tokens; history: [TURNS], NaN where unknown;
    sequences: trajectories of the minibatch over all ranks. A turn without a history has no penalty. Raises ValueError
    if low is above high.

    The hinge applies to each turn before the mean: a hinge of the mean could not be split over micro-batches.
    """
    if not 0 <= low <= high:
        raise ValueError(f"the entropy band of EPO is [{low}, {high}] of its history: it needs 0 <= low <= high")
    means, present = turn_entropy(entropy, mask)
    values = torch.from_numpy(history).to(means)
    judged = present & torch.isfinite(values)
    distances = masked_fill_zero(hinge(means, values.nan_to_num(), low=low, high=high), judged)
    return weight * (distances.sum(-1) / judged.sum(-1).clamp(min=1)).sum() / max(1, sequences)
