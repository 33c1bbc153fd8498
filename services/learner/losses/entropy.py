"""Entropy kept near its own history: EPO's hinge, with a gradient (docs/algorithms/epo.md). Pure.

    weight * mean_i [ relu(low * H_history - H_i) + relu(H_i - high * H_history) ]

H_i is the mean entropy of trajectory i's trainable tokens, H_history the mean over earlier versions.
"""

import math

import torch
from torch import Tensor

from palimpsest.services.learner.losses.types import masked_fill_zero


class EntropyHistory:
    """Mean entropies of the versions trained so far, nats a token. The one being trained is added afterwards.

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

    @property
    def mean(self) -> float | None:
        """H_history; None while there is none."""
        return self._total / self._count if self._count else None

    def add(self, entropy: float) -> None:
        """A version was trained with this mean over its trajectories and all ranks. Raises ValueError for NaN or
        infinity, which would stay in the mean for good."""
        if not math.isfinite(entropy):
            raise ValueError(f"a version's mean entropy is {entropy}: leave versions without one out of the history")
        self._total += entropy
        self._count += 1

    def state(self) -> dict[str, float]:
        """For a checkpoint."""
        return {"total": self._total, "count": self._count}

    def restore(self, state: dict[str, float]) -> None:
        """Go on from a checkpoint."""
        self._total, self._count = state["total"], state["count"]


def trajectory_entropy(entropy: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """H_i [rows], 0 where a row has none, and which rows have one (bool [rows]).

    entropy: [rows, tokens], nats; mask: bool, trainable tokens. One that is not finite is left out of the mean.
    """
    usable = mask & torch.isfinite(entropy)
    count = usable.sum(-1)
    return masked_fill_zero(entropy, usable).sum(-1) / count.clamp(min=1), count > 0


def hinge(entropy: Tensor, history: float, *, low: float, high: float) -> Tensor:
    """How far each entropy is outside [low * history, high * history], nats; no gradient inside."""
    return torch.relu(low * history - entropy) + torch.relu(entropy - high * history)


def epo_loss(
    entropy: Tensor, mask: Tensor, *, history: float | None, low: float, high: float, weight: float, sequences: int
) -> Tensor:
    """This micro-batch's share of the penalty, a scalar with gradient; shares add up like those of `aggregate`.

    entropy: [rows, tokens] with gradient, nats; mask: bool, trainable tokens; sequences: trajectories of the minibatch
    over all ranks. Without a history the penalty is 0. Raises ValueError when low is above high.

    The hinge is each trajectory's, then averaged: the hinge of the average could not be split over micro-batches.
    """
    if not 0 <= low <= high:
        raise ValueError(f"the entropy band of EPO is [{low}, {high}] of its history: it needs 0 <= low <= high")
    means, present = trajectory_entropy(entropy, mask)
    if history is None:
        return masked_fill_zero(means, torch.zeros_like(present)).sum()
    return weight * masked_fill_zero(hinge(means, history, low=low, high=high), present).sum() / max(1, sequences)
