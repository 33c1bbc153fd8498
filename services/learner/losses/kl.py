"""Sample estimates of the KL divergence, and the KL penalty (docs/algorithms/kl-to-reference.md). Pure.

For samples from q and log_ratio = log p - log q, each estimates KL(q || p):

    k1 = -log_ratio        k2 = log_ratio^2 / 2        k3 = exp(log_ratio) - 1 - log_ratio

k1 and k3 are unbiased; k2 is biased. k1 has either sign; k2 and k3 are never negative. With the inverted ratio
(log q - log p), k3 requires samples from p.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from palimpsest.services.learner.corrections import log_ratio
from palimpsest.services.learner.losses.types import masked_fill_zero

Estimator = Literal["k1", "k2", "k3"]


def k1(log_ratio: Tensor) -> Tensor:
    """Return -log_ratio, nats: unbiased, of either sign."""
    return -log_ratio


def k2(log_ratio: Tensor) -> Tensor:
    """Return log_ratio^2 / 2, nats: biased, of low variance."""
    return log_ratio.square() / 2


def k3(log_ratio: Tensor) -> Tensor:
    """Return exp(log_ratio) - 1 - log_ratio, nats: unbiased, never negative. The caller clamps the log-ratio."""
    return torch.expm1(log_ratio) - log_ratio


def estimate(log_ratio: Tensor, estimator: Estimator) -> Tensor:
    """Apply the estimator with this name. Raises ValueError for an unknown name."""
    match estimator:
        case "k1":
            return k1(log_ratio)
        case "k2":
            return k2(log_ratio)
        case "k3":
            return k3(log_ratio)
    raise ValueError(f"unknown divergence estimator {estimator!r}; use one of {', '.join(get_args(Estimator))}")


def kl_loss(
    current: Tensor, reference: Tensor, behavior: Tensor, mask: Tensor, *, estimator: Estimator, unbiased: bool
) -> Tensor:
    """Return the estimate of KL(current || reference) of each token, [rows, tokens]; aggregate it like token losses.

    current (with gradient), reference, behavior: log-probs, nats; mask: bool, tokens of the loss. The result is 0 off
    the mask and where a log-prob is not finite. unbiased: multiply by the detached total ratio, because the behavior
    policy sampled the tokens.

    The value is that of the estimator. The gradient is always that of k2: (log current - log reference) times the
    gradient of the log-prob. Under samples from the current policy, this is the gradient of the divergence. The
    gradient of k1 is zero on average, and the gradient of k3 belongs to KL(reference || current).
    """
    usable = mask & torch.isfinite(current) & torch.isfinite(reference) & torch.isfinite(behavior)
    apart = log_ratio(reference.detach(), current, usable)
    gradient = k2(apart)
    value = gradient + (estimate(apart, estimator) - gradient).detach()
    if unbiased:
        value = log_ratio(current.detach(), behavior.detach(), usable).exp() * value
    return masked_fill_zero(value, usable)
