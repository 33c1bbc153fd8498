"""One value per trajectory, computed from the rewards of its group. Pure (docs/paper.md, "advantages").

For `grpo`, `dr_grpo` and `rloo`, the value is the advantage of every token of the trajectory. For the token-level kinds
(token_level.py), it is the reward at the last trainable token of the trajectory.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Rewards = NDArray[np.float64]
EPSILON = 1e-6


def grpo(rewards: Rewards) -> Rewards:
    """Return (R - mean) / (std + 1e-6), unbiased std. [group]

    >>> grpo(np.array([1.0, 0.0, 0.0, 1.0])).round(5).tolist()
    [0.86602, -0.86602, -0.86602, 0.86602]
    """
    advantages: Rewards = dr_grpo(rewards) / (rewards.std(ddof=1) + EPSILON)
    return advantages


def dr_grpo(rewards: Rewards) -> Rewards:
    """Return R - mean, without a division by the deviation. [group]

    >>> dr_grpo(np.array([1.0, 0.0, 0.0, 1.0])).tolist()
    [0.5, -0.5, -0.5, 0.5]
    """
    if (rewards == rewards[0]).all():
        return np.zeros_like(rewards)  # exact zeros: the mean of equal numbers can have a rounding error
    advantages: Rewards = rewards - rewards.mean()
    return advantages


def rloo(rewards: Rewards) -> Rewards:
    """Return R - mean of the others (leave-one-out), an unbiased baseline. [group]

    >>> rloo(np.array([1.0, 0.0, 0.0, 1.0])).round(5).tolist()
    [0.66667, -0.66667, -0.66667, 0.66667]
    """
    advantages: Rewards = dr_grpo(rewards) * len(rewards) / (len(rewards) - 1)
    return advantages


def raw(rewards: Rewards) -> Rewards:
    """Return the rewards unchanged. [group]"""
    return rewards


ESTIMATORS: dict[str, Callable[[Rewards], Rewards]] = {
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "rloo": rloo,
    "reinforce_pp": raw,
    "reinforce_pp_baseline": dr_grpo,
    "gae": raw,
}
WITHOUT_BASELINE = ("reinforce_pp", "gae")
"""Kinds that accept a group of one trajectory."""


def group_advantages(kind: str, rewards: Sequence[float]) -> list[float]:
    """Return Row.advantage of each trajectory of one group.

    grpo, dr_grpo, rloo: the advantage of each of its tokens. reinforce_pp, gae: its reward. reinforce_pp_baseline: its
    reward minus the group mean. `token_advantages` computes token advantages from the last three. Raises ValueError for
    an unknown kind, and for fewer than two trajectories where the kind needs a group baseline.
    """
    if kind not in ESTIMATORS:
        raise ValueError(f"unknown kind of advantages {kind!r}; use one of {', '.join(ESTIMATORS)}")
    if len(rewards) < 2 and kind not in WITHOUT_BASELINE:
        raise ValueError(f"a group of {len(rewards)} has no baseline; {kind} needs at least 2 trajectories")
    return [float(a) for a in ESTIMATORS[kind](np.asarray(rewards, dtype=np.float64))]
