"""Effective sample sizes of a batch, from the weights of tokens and trajectories in the loss. Pure."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from palimpsest.services.learner.observability.token_statistics import (
    BOUND,
    LogRatios,
    Tokens,
    effective_sample_share,
    ess_share,
)

Array = NDArray[Any]


def effective_sample_sizes(tokens: Tokens, weight: Array, trajectory: Array, *, by_total: bool) -> dict[str, float]:
    """Return ESS / N of four kinds of weights; NaN if no token has a weight.

    weight: [tokens], the correction's factor, 0 where masked; trajectory: [tokens], number of the token's trajectory.
    by_total: the objective uses the total ratio instead of the weight (MiniRL).

    `tokens_raw`: of the total ratios of tokens. `sequences_raw`: of the products of total ratios over each trajectory.
    `tokens_used`: of the weights in the loss (truncated and masked) times the staleness ratio before any clip.
    `sequences_used`: of the means of these over each trajectory. Only the raw values measure how far the samples are
    off-policy; truncation raises the ESS.
    """
    ratios, kept = LogRatios.of(tokens), tokens.finite
    unclamped, used = np.zeros(len(kept)), np.zeros(len(kept))
    unclamped[kept] = tokens.current[kept].astype(np.float64) - tokens.behavior[kept]
    used[kept] = np.exp(ratios.total) if by_total else weight[kept] * np.exp(ratios.staleness)
    used[weight == 0] = 0.0
    _, number = np.unique(trajectory, return_inverse=True)
    lengths: Array = np.bincount(number)
    with np.errstate(divide="ignore"):
        return {
            "tokens_raw": effective_sample_share(tokens),
            "tokens_used": ess_share(np.log(used)),
            "sequences_raw": ess_share(np.bincount(number, weights=unclamped, minlength=len(lengths))),
            "sequences_used": ess_share(
                np.log(np.bincount(number, weights=used, minlength=len(lengths)) / np.maximum(lengths, 1))
            ),
        }


def capped_weights(
    tokens: Tokens,
    weight: Array,
    trajectory: Array,
    *,
    low: float | None,
    high: float | None,
    of_sequence: bool,
) -> dict[str, int] | None:
    """Return the numbers of kept tokens whose weight was raised to `low` or lowered to `high`; None without bounds.

    of_sequence: the weight is the product of the trajectory's discrepancies, with its log clamped to +-20 as in the
    loss.
    """
    if low is None and high is None:
        return None
    finite = np.isfinite(tokens.proximal) & np.isfinite(tokens.behavior) & ~tokens.missing
    discrepancy = tokens.proximal[finite].astype(np.float64) - tokens.behavior[finite]
    log_weight: Array = np.zeros(len(finite))
    log_weight[finite] = discrepancy
    if of_sequence and len(trajectory):
        _, number = np.unique(trajectory, return_inverse=True)
        log_weight = np.bincount(number, weights=log_weight)[number]
    log_weight = np.clip(log_weight, -BOUND, BOUND)
    kept = weight > 0
    return {
        "low": 0 if low is None else int((kept & (log_weight < np.log(low))).sum()),
        "high": 0 if high is None else int((kept & (log_weight > np.log(high))).sum()),
    }
