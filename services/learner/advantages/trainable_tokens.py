"""Packing of the trainable tokens of each row, so that the next token is the next trainable token. Pure.

Tool tokens between two turns were not sampled by the policy. Credit passes over them unchanged: packing removes them
before any sum.
"""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
"""Arithmetic uses float64; inputs may be float32."""
Floats = NDArray[np.floating]
Mask = NDArray[np.bool_]


def check_mask(mask: Mask) -> None:
    """Raise ValueError unless the mask is bool and [rows, tokens]."""
    if mask.dtype != np.bool_ or mask.ndim != 2:
        raise ValueError(f"the mask is {mask.dtype} of shape {mask.shape}; it must be bool, [rows, tokens]")


def check_share(name: str, value: float) -> None:
    """Raise ValueError unless the value is in [0, 1]."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is {value}; it must be in [0, 1]")


def trainable(name: str, values: Floats, mask: Mask) -> Array:
    """Return the values of the trainable tokens, row by row. [trainable tokens of all rows]

    values, mask: [rows, tokens]. Raises ValueError, with this name, for another shape and for a trainable token whose
    value is not finite, because whitening would spread it over the batch.
    """
    if values.shape != mask.shape:
        raise ValueError(f"{name} has shape {values.shape}, the mask {mask.shape}; the shapes must be equal")
    chosen = values[mask].astype(np.float64)
    if bad := int((~np.isfinite(chosen)).sum()):
        raise ValueError(f"{name}: {bad} of {chosen.size} trainable tokens are not finite")
    return chosen


def pack(name: str, values: Floats, mask: Mask) -> Array:
    """Return the values of the trainable tokens, left-aligned, padded with 0. [rows, most trainable tokens of a row]

    Raises ValueError as `trainable` does.

    >>> pack("rewards", np.array([[9.0, 1.0, 9.0, 2.0]]), np.array([[False, True, False, True]])).tolist()
    [[1.0, 2.0]]
    """
    filled = slots(mask)
    packed = np.zeros(filled.shape)
    packed[filled] = trainable(name, values, mask)  # both go row by row, left to right
    return packed


def unpack(packed: Array, mask: Mask) -> Array:
    """Return each packed value at its token; 0 where untrainable. [rows, tokens]"""
    values = np.zeros(mask.shape)
    values[mask] = packed[slots(mask)]
    return values


def slots(mask: Mask) -> Mask:
    """Return the places of a packed array that hold a token. [rows, most trainable tokens of a row]"""
    counts = mask.sum(axis=1)
    filled: Mask = np.arange(counts.max(initial=0)) < counts[:, None]
    return filled


def last_slots(mask: Mask) -> Mask:
    """Return the place of each row's last token in a packed array; none in a row without trainable tokens."""
    counts = mask.sum(axis=1)
    last: Mask = np.arange(counts.max(initial=0)) == counts[:, None] - 1
    return last


def packed_rewards(mask: Mask, rewards: Floats, token_rewards: Floats | None) -> Array:
    """Return the packed reward of each trainable token: its token reward, plus the trajectory reward at the last one.

    mask, token_rewards: [rows, tokens]; rewards: [rows]. Raises ValueError for differing shapes and values that are not
    finite.
    """
    check_mask(mask)
    if rewards.shape != mask.shape[:1]:
        raise ValueError(f"rewards has shape {rewards.shape}; expected one for each of {mask.shape[0]} rows")
    if not np.isfinite(rewards).all():
        raise ValueError(f"rewards: {rewards[~np.isfinite(rewards)][0]} is not finite")
    packed = np.zeros(slots(mask).shape) if token_rewards is None else pack("token_rewards", token_rewards, mask)
    packed += np.where(last_slots(mask), rewards[:, None], 0.0)
    return packed


def discounted_sums(packed: Array, rate: float) -> Array:
    """Return sum over u >= t of rate^(u - t) x_u, for each t. [rows, places]

    Computed by doubling: two adjacent sums of n values give one sum of 2n values. The recursion
    s_t = x_t + rate s_(t+1) then takes log2(places) array operations.

    >>> discounted_sums(np.array([[0.0, 0.0, 8.0]]), 0.5).tolist()
    [[2.0, 4.0, 8.0]]
    """
    sums, reach = packed.copy(), 1
    while reach < sums.shape[1]:
        sums[:, :-reach] += rate**reach * sums[:, reach:]
        reach *= 2
    return sums
