"""The trainable tokens of each row side by side, so that the next token is the next trainable one. Pure.

Between two turns stand tool tokens, which the policy did not sample. What the policy is credited with passes over them
unchanged: they are left out here, before anything is added up, rather than multiplied by 0 on the way.
"""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
"""Arithmetic is in float64; what comes in may be float32."""
Floats = NDArray[np.floating]
Mask = NDArray[np.bool_]


def check_mask(mask: Mask) -> None:
    """Raises ValueError unless it is bool and [rows, tokens]."""
    if mask.dtype != np.bool_ or mask.ndim != 2:
        raise ValueError(f"the mask is {mask.dtype} of shape {mask.shape}: it must be bool, [rows, tokens]")


def check_share(name: str, value: float) -> None:
    """Raises ValueError unless it is from 0 to 1."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is {value}: it must be from 0 to 1")


def trainable(name: str, values: Floats, mask: Mask) -> Array:
    """Values of the trainable tokens, row by row. [trainable tokens of all rows]

    values, mask: [rows, tokens]. Raises ValueError, with this name, for another shape and for a trainable token whose
    value is not finite: it would spoil the whole batch.
    """
    if values.shape != mask.shape:
        raise ValueError(f"{name} has shape {values.shape}, the mask {mask.shape}: they must be the same tokens")
    chosen = values[mask].astype(np.float64)
    if bad := int((~np.isfinite(chosen)).sum()):
        raise ValueError(f"{name}: {bad} of {chosen.size} trainable tokens are not finite: settle them beforehand")
    return chosen


def pack(name: str, values: Floats, mask: Mask) -> Array:
    """Values of the trainable tokens, moved to the left; 0 behind them. [rows, most trainable tokens of a row]

    Raises ValueError as `trainable` does.

    >>> pack("rewards", np.array([[9.0, 1.0, 9.0, 2.0]]), np.array([[False, True, False, True]])).tolist()
    [[1.0, 2.0]]
    """
    filled = slots(mask)
    packed = np.zeros(filled.shape)
    packed[filled] = trainable(name, values, mask)  # both go row by row, left to right
    return packed


def unpack(packed: Array, mask: Mask) -> Array:
    """Each value back at its token; 0 where untrainable. [rows, tokens]"""
    values = np.zeros(mask.shape)
    values[mask] = packed[slots(mask)]
    return values


def slots(mask: Mask) -> Mask:
    """Which places of a packed array hold a token. [rows, most trainable tokens of a row]"""
    counts = mask.sum(axis=1)
    filled: Mask = np.arange(counts.max(initial=0)) < counts[:, None]
    return filled


def last_slots(mask: Mask) -> Mask:
    """The place of each row's last token in a packed array; none in a row without trainable tokens."""
    counts = mask.sum(axis=1)
    last: Mask = np.arange(counts.max(initial=0)) == counts[:, None] - 1
    return last


def packed_rewards(mask: Mask, rewards: Floats, token_rewards: Floats | None) -> Array:
    """Reward of each trainable token, packed: the trajectory's at the last one, and its own, if there are any.

    mask, token_rewards: [rows, tokens]; rewards: [rows]. Raises ValueError for other shapes and what is not finite.
    """
    check_mask(mask)
    if rewards.shape != mask.shape[:1]:
        raise ValueError(f"rewards has shape {rewards.shape}: one for each of {mask.shape[0]} rows is due")
    if not np.isfinite(rewards).all():
        raise ValueError(f"rewards: {rewards[~np.isfinite(rewards)][0]} is no reward")
    packed = np.zeros(slots(mask).shape) if token_rewards is None else pack("token_rewards", token_rewards, mask)
    packed += np.where(last_slots(mask), rewards[:, None], 0.0)
    return packed


def discounted_sums(packed: Array, rate: float) -> Array:
    """sum over u >= t of rate^(u - t) x_u, for each t. [rows, places]

    By doubling: a sum of the next n values and that of the n behind them make one of 2n. So the recursion
    s_t = x_t + rate s_(t+1) takes log2(places) operations on whole arrays in place of one for each token.

    >>> discounted_sums(np.array([[0.0, 0.0, 8.0]]), 0.5).tolist()
    [[2.0, 4.0, 8.0]]
    """
    sums, reach = packed.copy(), 1
    while reach < sums.shape[1]:
        sums[:, :-reach] += rate**reach * sums[:, reach:]
        reach *= 2
    return sums
