"""One number for each trajectory, from the rewards of its group. Pure; docs/paper.md, "advantages".

With `grpo`, `dr_grpo` and `rloo` the number is the advantage of every token of the trajectory. With the kinds that
speak of each token (tokens.py) it is the reward that the trajectory's last trainable token gets.
"""

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
    advantages: Rewards = dr_grpo(rewards) / (rewards.std(ddof=1) + EPSILON)
    return advantages


def dr_grpo(rewards: Rewards) -> Rewards:
    """R - mean: no division, so that easy and hard groups weigh as their rewards do. [group]

    >>> dr_grpo(np.array([1.0, 0.0, 0.0, 1.0])).tolist()
    [0.5, -0.5, -0.5, 0.5]
    """
    if (rewards == rewards[0]).all():
        return np.zeros_like(rewards)  # exactly: the mean of equal numbers may be off by a rounding
    advantages: Rewards = rewards - rewards.mean()
    return advantages


def rloo(rewards: Rewards) -> Rewards:
    """R - mean of the others: an unbiased baseline. [group]

    >>> rloo(np.array([1.0, 0.0, 0.0, 1.0])).round(5).tolist()
    [0.66667, -0.66667, -0.66667, 0.66667]
    """
    advantages: Rewards = dr_grpo(rewards) * len(rewards) / (len(rewards) - 1)
    return advantages


def raw(rewards: Rewards) -> Rewards:
    """The rewards as they are. [group]"""
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
"""Kinds for which a trajectory alone makes a group."""


def group_advantages(kind: str, rewards: Sequence[float]) -> list[float]:
    """What each trajectory of one group is given as its `advantage` (Row.advantage).

    grpo, dr_grpo, rloo: the advantage of each of its tokens. reinforce_pp, gae: its reward; reinforce_pp_baseline: its
    reward less the group's mean; from these `token_advantages` makes the tokens' advantages. Raises ValueError for a
    kind that there is not, and for fewer than two trajectories where the group is the baseline.
    """
    if kind not in ESTIMATORS:
        raise ValueError(f"no advantages are called {kind}: take one of {', '.join(ESTIMATORS)}")
    if len(rewards) < 2 and kind not in WITHOUT_BASELINE:
        raise ValueError(f"a group of {len(rewards)} has no baseline")
    return [float(a) for a in ESTIMATORS[kind](np.asarray(rewards, dtype=np.float64))]
