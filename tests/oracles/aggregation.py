"""Aggregation of token losses (algorithms.md 10) in float64 numpy, over unpadded trajectories of different lengths."""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def aggregate(trajectories: list[Array], mode: str, *, length: int) -> float:
    """Aggregate the losses of trajectories. Each array holds the losses of the trainable tokens, 0 for removed ones."""
    counted = [losses for losses in trajectories if len(losses)]
    if mode == "token_mean":
        return float(np.concatenate(counted).mean())
    if mode == "seq_mean_token_sum":
        return float(np.mean([losses.sum() for losses in counted]))
    if mode == "seq_mean_token_mean":
        return float(np.mean([losses.mean() for losses in counted]))
    assert mode == "dr_grpo"
    return float(sum(losses.sum() for losses in counted) / (len(counted) * length))
