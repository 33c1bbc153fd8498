"""Estimates of a divergence from samples, and the penalty made of one (docs/algorithms/kl-to-reference.md). Pure.

For samples of q and log_ratio = log p - log q, each estimates KL(q || p):

    k1 = -log_ratio        k2 = log_ratio^2 / 2        k3 = exp(log_ratio) - 1 - log_ratio

k1 and k3 are unbiased, k2 is not; k1 has either sign, k2 and k3 none below 0. Turned round (log q - log p), k3 speaks
of other samples than those at hand.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from palimpsest.services.learner.corrections import log_ratio
from palimpsest.services.learner.losses.types import masked_fill_zero

Estimator = Literal["k1", "k2", "k3"]


def k1(log_ratio: Tensor) -> Tensor:
    """-log_ratio, nats: unbiased, of either sign."""
    return -log_ratio


def k2(log_ratio: Tensor) -> Tensor:
    """log_ratio^2 / 2, nats: biased, of low variance."""
    return log_ratio.square() / 2


def k3(log_ratio: Tensor) -> Tensor:
    """exp(log_ratio) - 1 - log_ratio, nats: unbiased, never negative. Clamp the log-ratio before."""
    return torch.expm1(log_ratio) - log_ratio


def estimate(log_ratio: Tensor, estimator: Estimator) -> Tensor:
    """The estimator of this name. Raises ValueError when there is none."""
    match estimator:
        case "k1":
            return k1(log_ratio)
        case "k2":
            return k2(log_ratio)
        case "k3":
            return k3(log_ratio)
    raise ValueError(f"{estimator!r} is no estimator of a divergence: take one of {', '.join(get_args(Estimator))}")


def kl_loss(
    current: Tensor, reference: Tensor, behavior: Tensor, mask: Tensor, *, estimator: Estimator, unbiased: bool
) -> Tensor:
    """KL(current || reference) at each token, [rows, tokens], to be aggregated like the objective's losses.

    current (with gradient), reference, behavior: log-probs, nats; mask: bool, tokens of the loss. 0 off the mask and
    where a log-prob is not finite. unbiased: weighted by the (detached) total ratio, because the samples are of the
    behavior policy and not of the current one.

    The value is the estimator's, the gradient always k2's: (log current - log reference) times that of the log-prob.
    Under samples of the current policy that is the divergence's own gradient. k1's would be zero on average, and k3's
    belongs to KL(reference || current).
    """
    usable = mask & torch.isfinite(current) & torch.isfinite(reference) & torch.isfinite(behavior)
    apart = log_ratio(reference.detach(), current, usable)
    gradient = k2(apart)
    value = gradient + (estimate(apart, estimator) - gradient).detach()
    if unbiased:
        value = log_ratio(current.detach(), behavior.detach(), usable).exp() * value
    return masked_fill_zero(value, usable)
