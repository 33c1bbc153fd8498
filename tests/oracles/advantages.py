"""Advantages and the value loss in float64 numpy, one token at a time."""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]


def leave_one_out(rewards: list[float]) -> list[float]:
    """Each reward minus the mean of the others (algorithms.md 8)."""
    return [r - sum(rewards[:i] + rewards[i + 1 :]) / (len(rewards) - 1) for i, r in enumerate(rewards)]


def over_deviation(rewards: list[float]) -> list[float]:
    """(R - mean) / (std + 1e-6) with the unbiased std (algorithms.md 8)."""
    mean = sum(rewards) / len(rewards)
    variance = sum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1)
    return [(r - mean) / (variance**0.5 + 1e-6) for r in rewards]


def token_rewards_of(mask: Mask, rewards: Array, own: Array | None) -> Array:
    """Reward of each token: its own, plus the trajectory's reward at the last trainable token."""
    given = np.zeros(mask.shape)
    for row in range(mask.shape[0]):
        places = np.flatnonzero(mask[row])
        for place in places:
            given[row, place] = (0.0 if own is None else own[row, place]) + (
                rewards[row] if place == places[-1] else 0.0
            )
    return given


def returns_to_go(mask: Mask, rewards: Array, own: Array | None, gamma: float) -> Array:
    """G_t = sum over trainable u >= t of gamma^(trainable tokens from t to u) r_u."""
    given, result = token_rewards_of(mask, rewards, own), np.zeros(mask.shape)
    for row in range(mask.shape[0]):
        places = np.flatnonzero(mask[row])
        for i, t in enumerate(places):
            result[row, t] = sum(gamma**k * given[row, u] for k, u in enumerate(places[i:]))
    return result


def generalized(mask: Mask, rewards: Array, own: Array | None, values: Array, gamma: float, lam: float) -> Array:
    """A_t = sum over k of (1 - lam) lam^(k - 1) (G_t^(k) - V_t), with the remaining weight on the largest k.

    G_t^(k) is the return of k steps plus the discounted value after them. This is the explicit mixture of estimates,
    not the recursion.
    """
    given, result = token_rewards_of(mask, rewards, own), np.zeros(mask.shape)
    for row in range(mask.shape[0]):
        places = np.flatnonzero(mask[row])
        states = [values[row, t] for t in places]
        if len(places):
            states.append(0.0)
        for i, t in enumerate(places):
            steps = len(places) - i
            brought, estimates = 0.0, []
            for k in range(1, steps + 1):
                brought += gamma ** (k - 1) * given[row, places[i + k - 1]]
                estimates.append(brought + gamma**k * states[i + k] - states[i])
            weights = [(1 - lam) * lam ** (k - 1) for k in range(1, steps)] + [lam ** (steps - 1)]
            result[row, t] = sum(w * e for w, e in zip(weights, estimates, strict=True))
    return result


def whitened(parts: list[tuple[Array, Mask]]) -> list[Array]:
    """(x - mean) / sqrt(unbiased variance + 1e-8) over the trainable tokens of all parts."""
    every = [float(values[index]) for values, mask in parts for index in np.ndindex(mask.shape) if mask[index]]
    if len(every) < 2:
        return [np.zeros(mask.shape) for _, mask in parts]
    mean = sum(every) / len(every)
    variance = sum((x - mean) ** 2 for x in every) / (len(every) - 1)
    result = []
    for values, mask in parts:
        even = np.zeros(mask.shape)
        even[mask] = (values[mask] - mean) / np.sqrt(variance + 1e-8)
        result.append(even)
    return result


def clipped_value_loss(
    values: Array, returns: Array, before: Array, mask: Mask, *, clip: float | None, denominator: float
) -> tuple[float, Array]:
    """Loss and its gradient with respect to the values: half the larger of the two squares, summed over the mask."""
    loss, gradient = 0.0, np.zeros(mask.shape)
    for index in np.ndindex(mask.shape):
        if not mask[index]:
            continue
        value, target = values[index], returns[index]
        kept = value if clip is None else min(max(value, before[index] - clip), before[index] + clip)
        if (kept - target) ** 2 > (value - target) ** 2:
            loss += 0.5 * (kept - target) ** 2 / denominator  # the clipped value is constant: no gradient
        else:
            loss += 0.5 * (value - target) ** 2 / denominator
            gradient[index] = (value - target) / denominator
    return loss, gradient
