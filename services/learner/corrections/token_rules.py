"""Rules that judge each token by itself. Pure. All return bool [rows, tokens]: removed.

log_discrepancy is log pi_prox / mu in nats, 0 off `usable` (trainable, and both log-probs are there and finite).
A bound that is met exactly keeps the token.
"""

import torch
from torch import Tensor

from palimpsest.services.learner.corrections.ratios import above, below
from palimpsest.services.learner.corrections.rules import Interval


def band_rule(log_discrepancy: Tensor, usable: Tensor, band: float) -> dict[str, Tensor]:
    """Outside [1/band, band], by the side: the same on both, whatever the sign of the advantage."""
    removed = usable & above(log_discrepancy.abs(), band)
    return {"band_high": removed & (log_discrepancy > 0), "band_low": removed & (log_discrepancy < 0)}


def tokens_rule(log_discrepancy: Tensor, usable: Tensor, interval: Interval) -> dict[str, Tensor]:
    """Outside the interval of ratios, by the side."""
    low, high = interval
    return {"tokens_high": usable & above(log_discrepancy, high), "tokens_low": usable & below(log_discrepancy, low)}


def difference_rule(proximal: Tensor, behavior: Tensor, usable: Tensor, bound: float) -> Tensor:
    """|pi_prox - mu| > bound: a difference of probabilities. proximal, behavior: log-probs, nats."""
    zero = torch.zeros((), device=usable.device)
    # rounding may put a log-prob a little above 0; no probability is above 1
    ours, theirs = (torch.where(usable, logprobs, zero).clamp(max=0.0).exp() for logprobs in (proximal, behavior))
    return usable & ((ours - theirs).abs() > bound)


def divergence_estimate(estimator: str, log_discrepancy: Tensor) -> Tensor:
    """Of KL(mu || pi_prox) from one token that mu sampled, with x = log pi_prox / mu. float64, nats.

    k1 = -x (unbiased, signed), k2 = x^2 / 2 (biased, varies less), k3 = e^x - 1 - x (unbiased, never negative).
    Raises ValueError for another name.
    """
    x = log_discrepancy.double()
    match estimator:
        case "k1":
            return -x
        case "k2":
            return x.square() / 2
        case "k3":
            return torch.expm1(x) - x
    raise ValueError(f"there is no divergence estimate {estimator}, only k1, k2 and k3")


def estimate_rule(estimator: str, log_discrepancy: Tensor, usable: Tensor, bound: float) -> Tensor:
    """The token's own estimate is above the bound."""
    return usable & (divergence_estimate(estimator, log_discrepancy) > bound)
