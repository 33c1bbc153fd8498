"""Group-relative advantages from scalar rewards. Pure; docs/paper.md, "advantages"."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Rewards = NDArray[np.float64]
EPSILON = 1e-6


def grpo(rewards: Rewards) -> Rewards:
    """(R - mean) / (std + 1e-6), unbiased std. [group]

    >>> grpo(np.array([1.0, 0.0, 0.0, 1.0])).round(5).tolist()
    [0.86602, -0.86602, -0.86602, 0.86602]
    """
    advantages: Rewards = (rewards - rewards.mean()) / (rewards.std(ddof=1) + EPSILON)
    return advantages


def dr_grpo(rewards: Rewards) -> Rewards:
    """R - mean: no division, so that easy and hard groups weigh as their rewards do. [group]

    >>> dr_grpo(np.array([1.0, 0.0, 0.0, 1.0])).tolist()
    [0.5, -0.5, -0.5, 0.5]
    """
    advantages: Rewards = rewards - rewards.mean()
    return advantages


def rloo(rewards: Rewards) -> Rewards:
    """R - mean of the others: an unbiased baseline. [group]

    >>> rloo(np.array([1.0, 0.0, 0.0, 1.0])).round(5).tolist()
    [0.66667, -0.66667, -0.66667, 0.66667]
    """
    advantages: Rewards = (rewards - rewards.mean()) * len(rewards) / (len(rewards) - 1)
    return advantages


ESTIMATORS: dict[str, Callable[[Rewards], Rewards]] = {"grpo": grpo, "dr_grpo": dr_grpo, "rloo": rloo}


def group_advantages(kind: str, rewards: Sequence[float]) -> list[float]:
    """Advantage of each trajectory of one group. Raises ValueError for fewer than two: no baseline exists."""
    if len(rewards) < 2:
        raise ValueError(f"a group of {len(rewards)} has no baseline")
    return [float(a) for a in ESTIMATORS[kind](np.asarray(rewards, dtype=np.float64))]
