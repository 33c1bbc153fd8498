"""Rules for single tokens. Pure. All functions return the removed tokens, bool [rows, tokens].

log_discrepancy is log pi_prox / mu in nats, 0 off `usable` (trainable, with both log-probs present and finite). A value
equal to its bound passes.
"""

import torch
from torch import Tensor

from palimpsest.services.learner.corrections.ratios import above, below
from palimpsest.services.learner.corrections.rules import Interval


def band_rule(log_discrepancy: Tensor, usable: Tensor, band: float) -> dict[str, Tensor]:
    """Return the tokens outside [1/band, band], by side. The sign of the advantage does not matter."""
    removed = usable & above(log_discrepancy.abs(), band)
    return {"band_high": removed & (log_discrepancy > 0), "band_low": removed & (log_discrepancy < 0)}


def tokens_rule(log_discrepancy: Tensor, usable: Tensor, interval: Interval) -> dict[str, Tensor]:
    """Return the tokens outside the interval of ratios, by side."""
    low, high = interval
    return {"tokens_high": usable & above(log_discrepancy, high), "tokens_low": usable & below(log_discrepancy, low)}


def difference_rule(proximal: Tensor, behavior: Tensor, usable: Tensor, bound: float) -> Tensor:
    """Return the tokens with |pi_prox - mu| > bound. proximal, behavior: log-probs, nats."""
    zero = torch.zeros((), device=usable.device)
    # rounding can put a log-prob slightly above 0
    ours, theirs = (torch.where(usable, logprobs, zero).clamp(max=0.0).exp() for logprobs in (proximal, behavior))
    return usable & ((ours - theirs).abs() > bound)


def divergence_estimate(estimator: str, log_discrepancy: Tensor) -> Tensor:
    """Return the estimate of KL(mu || pi_prox) of each token, with x = log pi_prox / mu. float64, nats.

    k1 = -x (unbiased, signed), k2 = x^2 / 2 (biased, lower variance), k3 = e^x - 1 - x (unbiased, never negative).
    Raises ValueError for an unknown name.
    """
    x = log_discrepancy.double()
    match estimator:
        case "k1":
            return -x
        case "k2":
            return x.square() / 2
        case "k3":
            return torch.expm1(x) - x
    raise ValueError(f"unknown divergence estimate {estimator!r}; use k1, k2 or k3")


def estimate_rule(estimator: str, log_discrepancy: Tensor, usable: Tensor, bound: float) -> Tensor:
    """Return the tokens whose estimate is above the bound."""
    return usable & (divergence_estimate(estimator, log_discrepancy) > bound)
