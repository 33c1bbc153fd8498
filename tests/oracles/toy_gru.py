"""The policy of the toy benchmark in float64 numpy, one row and one token at a time, from the GRU equations."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def token_logprob(weights: Mapping[str, Array], tokens: list[int], place: int) -> float:
    """log p(tokens[place] | tokens[:place]).

    r, z = sigmoid(W x + b + U h + c); n = tanh(W x + b + r (U h + c)); h' = (1 - z) n + z h, the three stacked in W, U.
    """
    size = weights["embedding"].shape[1]
    state = np.zeros(size)
    for token in tokens[:place]:
        given = weights["embedding"][token] @ weights["input"] + weights["input_bias"]
        held = state @ weights["recurrent"] + weights["recurrent_bias"]
        reset = 1 / (1 + np.exp(-(given[:size] + held[:size])))
        keep = 1 / (1 + np.exp(-(given[size : 2 * size] + held[size : 2 * size])))
        new = np.tanh(given[2 * size :] + reset * held[2 * size :])
        state = (1 - keep) * new + keep * state
    scores = state @ weights["head"] + weights["head_bias"]
    return float(scores[tokens[place]] - np.log(np.exp(scores - scores.max()).sum()) - scores.max())


def rounded(values: Array, levels: int) -> Array:
    """Round each value to the nearest of `levels` equally spaced values from the minimum to the maximum."""
    grid = np.linspace(values.min(), values.max(), levels)
    return grid[np.abs(values[..., None] - grid).argmin(-1)]
