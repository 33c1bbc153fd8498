"""Statistics of discrepancy and staleness over the tokens of a batch. Pure; docs/algorithms/metrics-and-alerts.md.

All statistics are also computed for each staleness, because that detects a wrong proximal: with exact old log-probs the
discrepancy does not depend on staleness, with a surrogate it does.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
BOUND = 20.0
"""Log-ratios are clamped to +-BOUND nats before they are averaged."""
MEASURES = (
    "behavior_perplexity", "proximal_perplexity", "perplexity_difference", "discrepancy_chi2", "advantage_mean",
    "advantage_deviation",
)  # fmt: skip
"""Names of `whole_batch_measures`."""
SURE = 1e-3
"""A token with a behavior log-prob within SURE nats of 0 was certain: any two engines agree on it."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """Trainable tokens as columns. Arrays are [tokens], log-probs in nats."""

    staleness: Array
    behavior: Array
    proximal: Array
    current: Array
    old: Array
    """Old log-probs, NaN for tokens without one."""
    entropy: Array
    advantages: Array
    masked: Array
    clipped: Array
    causes: dict[str, Array] = field(default_factory=dict)
    """Cause -> bool: the tokens that this mask or clip removes. A cause that was not evaluated has no key."""

    @classmethod
    def joined(cls, parts: "Sequence[Tokens]") -> "Tokens":
        """Concatenate the parts. Raises ValueError without parts."""
        arrays: dict[str, Any] = {name: np.concatenate([getattr(part, name) for part in parts]) for name in _ARRAYS}
        names = dict.fromkeys(cause for part in parts for cause in part.causes)
        causes = {name: np.concatenate([part.removed_by(name) for part in parts]) for name in names}
        return cls(**arrays, causes=causes)

    def at(self, staleness: int) -> "Tokens":
        """Return the tokens of this staleness."""
        return self.where(self.staleness == staleness)

    def where(self, chosen: Array) -> "Tokens":
        """Return the tokens where `chosen` (bool, [tokens]) is True."""
        causes = {cause: removed[chosen] for cause, removed in self.causes.items()}
        arrays: dict[str, Any] = {name: getattr(self, name)[chosen] for name in _ARRAYS}
        return Tokens(**arrays, causes=causes)

    def removed_by(self, cause: str) -> Array:
        """bool: tokens that this cause removes, alone or with others."""
        return self.causes.get(cause, np.zeros(len(self.staleness), dtype=np.bool_))

    @property
    def missing(self) -> Array:
        """bool: tokens without a proximal log-prob."""
        return self.removed_by("missing")

    @property
    def finite(self) -> Array:
        """bool: tokens with three finite log-probs, which have ratios."""
        return _sound(self) & ~self.missing


@dataclass(frozen=True, slots=True)
class LogRatios:
    """Log-ratios of the tokens that have them; [tokens] float64, nats, each clamped to +-20.

    With a surrogate the proper names of the two are correction and update: only old log-probs separate the engine's
    discrepancy from the staleness.
    """

    discrepancy: Array
    """log proximal / behavior."""
    staleness: Array
    """log current / proximal."""

    @classmethod
    def of(cls, tokens: Tokens) -> "LogRatios":
        """Return the log-ratios. Tokens with a log-prob that is missing or not finite are left out."""
        kept = tokens.finite
        return cls(
            log_ratio(tokens.proximal[kept], tokens.behavior[kept]),
            log_ratio(tokens.current[kept], tokens.proximal[kept]),
        )

    @property
    def total(self) -> Array:
        """log current / behavior: the sum of the two."""
        sums: Array = self.discrepancy + self.staleness
        return sums


_ARRAYS = (
    "staleness", "behavior", "proximal", "current", "old", "entropy", "advantages", "masked", "clipped",
)  # fmt: skip


def summary(tokens: Tokens) -> dict[str, float]:
    """Return the count and means over the tokens.

    Means of log-ratios leave out tokens with a log-prob that is not finite or missing; `nonfinite` and `missing` count
    these tokens.
    """
    ratios = LogRatios.of(tokens)
    return {
        "tokens": float(len(tokens.staleness)),
        "log_discrepancy": _mean(ratios.discrepancy),
        "log_discrepancy_abs": _mean(np.abs(ratios.discrepancy)),
        "discrepancy_k3": _mean(_k3(ratios.discrepancy)),
        "log_staleness_ratio": _mean(ratios.staleness),
        "log_staleness_ratio_abs": _mean(np.abs(ratios.staleness)),
        "log_total_ratio_abs": _mean(np.abs(ratios.total)),
        "masked": _mean(tokens.masked),
        "clipped": _mean(tokens.clipped),
        "entropy": _mean(tokens.entropy[np.isfinite(tokens.entropy)]),
        "nonfinite": float((~_sound(tokens) & ~tokens.missing).sum()),
        "missing": float(tokens.missing.sum()),
    }


def divergences(tokens: Tokens) -> dict[str, float]:
    """Return distances between the three policies, over the tokens with ratios.

    With x = log proximal / behavior, `discrepancy_k1` = mean -x and `discrepancy_k2` = mean x^2 / 2, in nats (k3 is in
    `summary`): estimates of KL(behavior || proximal). `staleness_k1`, `staleness_k3`: the same with x = log current /
    proximal. `difference_max`: largest |p - q| of the proximal and the behavior probability. `correlation`: of the
    proximal and the behavior log-probs over the tokens, NaN if one does not vary. `unsure`: number of tokens that the
    engine was not certain of; `same`: share of these with a discrepancy of exactly 1, NaN without any.
    """
    ratios, kept = LogRatios.of(tokens), tokens.finite
    proximal, behavior = tokens.proximal[kept].astype(np.float64), tokens.behavior[kept].astype(np.float64)
    unsure = behavior < -SURE
    difference = np.abs(np.exp(np.minimum(proximal, 0.0)) - np.exp(np.minimum(behavior, 0.0)))
    return {
        "discrepancy_k1": _mean(-ratios.discrepancy),
        "discrepancy_k2": _mean(ratios.discrepancy**2 / 2),
        "staleness_k1": _mean(-ratios.staleness),
        "staleness_k3": _mean(_k3(ratios.staleness)),
        "difference_max": float(difference.max()) if len(difference) else float("nan"),
        "correlation": correlation(proximal, behavior),
        "unsure": float(unsure.sum()),
        "same": float((ratios.discrepancy[unsure] == 0.0).mean()) if unsure.any() else float("nan"),
    }


def by_staleness(tokens: Tokens, of: Callable[[Tokens], dict[str, float]] = summary) -> dict[int, dict[str, float]]:
    """Return a dict: staleness -> `of` applied to its tokens."""
    return {int(s): of(tokens.at(int(s))) for s in np.unique(tokens.staleness)}


def whole_batch_measures(tokens: Tokens) -> dict[str, float]:
    """Return perplexities, chi-square and the advantages' moments; NaN without a token that has them.

    `behavior_perplexity`, `proximal_perplexity`: exp of minus the mean log-prob of the tokens with ratios; and
    `perplexity_difference`: the second minus the first. `discrepancy_chi2`: mean r^2 - 1 with r = proximal / behavior,
    an estimate of chi-square(proximal || behavior). `advantage_mean`, `advantage_deviation`: over all tokens with a
    finite advantage.
    """
    kept = tokens.finite
    behavior = float(np.exp(-_mean(tokens.behavior[kept].astype(np.float64))))
    proximal = float(np.exp(-_mean(tokens.proximal[kept].astype(np.float64))))
    advantages = tokens.advantages[np.isfinite(tokens.advantages)].astype(np.float64)
    return {
        "behavior_perplexity": behavior,
        "proximal_perplexity": proximal,
        "perplexity_difference": proximal - behavior,
        "discrepancy_chi2": _mean(np.expm1(2 * LogRatios.of(tokens).discrepancy)),
        "advantage_mean": _mean(advantages),
        "advantage_deviation": float(advantages.std()) if len(advantages) else float("nan"),
    }


def effective_sample_share(tokens: Tokens) -> float:
    """Return ESS / N of the total ratios of all tokens: 1 if all are equal (docs/paper.md, "ESS")."""
    return ess_share(np.nan_to_num(tokens.current.astype(np.float64) - tokens.behavior, nan=-np.inf))


def ess_share(log_weights: Array) -> float:
    """Return (sum w)^2 / (N sum w^2). A log-weight of -inf is a weight of 0. NaN if no weight is above 0."""
    if not len(log_weights) or not np.isfinite(log_weights.max()):
        return float("nan")
    weights = np.exp(log_weights - log_weights.max())
    return float(weights.sum() ** 2 / (weights**2).sum() / len(weights))


def correlation(a: Array, b: Array) -> float:
    """Return Pearson's correlation; NaN if one of the arrays is constant."""
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    a, b = a - a.mean(), b - b.mean()
    return float((a @ b) / np.sqrt((a @ a) * (b @ b)))


def _sound(tokens: Tokens) -> Array:
    finite: Array = np.isfinite(tokens.proximal) & np.isfinite(tokens.behavior) & np.isfinite(tokens.current)
    return finite


def log_ratio(numerator: Array, denominator: Array) -> Array:
    """numerator - denominator in float64, clamped to +-20 nats; [tokens]."""
    return np.clip(numerator.astype(np.float64) - denominator, -BOUND, BOUND)


def _k3(log_ratios: Array) -> Array:
    k3: Array = np.expm1(log_ratios) - log_ratios
    return k3


def _mean(values: Array) -> float:
    return float(values.mean()) if len(values) else float("nan")
