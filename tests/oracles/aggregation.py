"""algorithms.md 10 in float64 numpy: one loss of a list of trajectories, of different lengths and not padded."""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def aggregate(trajectories: list[Array], mode: str, *, length: int) -> float:
    """trajectories: the losses of each one's trainable tokens, 0 where removed."""
    counted = [losses for losses in trajectories if len(losses)]
    if mode == "token_mean":
        return float(np.concatenate(counted).mean())
    if mode == "seq_mean_token_sum":
        return float(np.mean([losses.sum() for losses in counted]))
    if mode == "seq_mean_token_mean":
        return float(np.mean([losses.mean() for losses in counted]))
    assert mode == "dr_grpo"
    return float(sum(losses.sum() for losses in counted) / (len(counted) * length))
