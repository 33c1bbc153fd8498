"""What the tokens of a batch say about discrepancy and staleness. Pure; docs/algorithms/metrics-and-alerts.md.

Everything is kept apart by staleness, because that is where a wrong proximal shows: with the exact one the discrepancy
does not depend on staleness, with a surrogate it does.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
BOUND = 20.0
"""Log-ratios are clamped to +-20 nats before they are averaged."""
SURE = 1e-3
"""A token whose behavior log-prob is within so many nats of 0 was certain: any two engines agree on it."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """Trainable tokens, one after another; arrays are [tokens], log-probs in nats."""

    staleness: Array
    behavior: Array
    proximal: Array
    current: Array
    old: Array
    """NaN where it is not known."""
    entropy: Array
    advantages: Array
    masked: Array
    clipped: Array
    causes: dict[str, Array] = field(default_factory=dict)
    """bool: what each mask and clip removes by itself. A cause that nothing here was judged by has no key."""

    @classmethod
    def joined(cls, parts: "Sequence[Tokens]") -> "Tokens":
        """All of them in one. Raises ValueError for none."""
        arrays: dict[str, Any] = {name: np.concatenate([getattr(part, name) for part in parts]) for name in _ARRAYS}
        names = dict.fromkeys(cause for part in parts for cause in part.causes)
        causes = {name: np.concatenate([part.removed_by(name) for part in parts]) for name in names}
        return cls(**arrays, causes=causes)

    def at(self, staleness: int) -> "Tokens":
        """Those of this staleness."""
        return self.where(self.staleness == staleness)

    def where(self, chosen: Array) -> "Tokens":
        """Those chosen, by a bool for each token."""
        causes = {cause: removed[chosen] for cause, removed in self.causes.items()}
        arrays: dict[str, Any] = {name: getattr(self, name)[chosen] for name in _ARRAYS}
        return Tokens(**arrays, causes=causes)

    def removed_by(self, cause: str) -> Array:
        """bool: by this cause, whatever others do."""
        return self.causes.get(cause, np.zeros(len(self.staleness), dtype=np.bool_))

    @property
    def missing(self) -> Array:
        """bool: there is no proximal."""
        return self.removed_by("missing")

    @property
    def finite(self) -> Array:
        """bool: all three log-probs are there and finite, so that the token has ratios."""
        return _sound(self) & ~self.missing


@dataclass(frozen=True, slots=True)
class LogRatios:
    """Of tokens that have them; [tokens] float64, nats, each clamped to +-20. With a surrogate in the proximal's place
    the first two are called correction and update: only with old log-probs is one the engine's and one the age's."""

    discrepancy: Array
    """log proximal / behavior."""
    staleness: Array
    """log current / proximal."""

    @classmethod
    def of(cls, tokens: Tokens) -> "LogRatios":
        """Tokens without a finite log-prob, or without a proximal, are left out."""
        kept = tokens.finite
        return cls(
            log_ratio(tokens.proximal[kept], tokens.behavior[kept]),
            log_ratio(tokens.current[kept], tokens.proximal[kept]),
        )

    @property
    def total(self) -> Array:
        """log current / behavior: the sum of both."""
        sums: Array = self.discrepancy + self.staleness
        return sums


_ARRAYS = (
    "staleness", "behavior", "proximal", "current", "old", "entropy", "advantages", "masked", "clipped",
)  # fmt: skip


def summary(tokens: Tokens) -> dict[str, float]:
    """Count and means over the tokens. Log-ratios leave out tokens that are not finite or have no proximal;
    `nonfinite` and `missing` count those."""
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
    """How far the three policies are apart, over the tokens that have ratios; nats, but for the last three.

    With x = log proximal / behavior, `discrepancy_k1` = mean -x and `discrepancy_k2` = mean x^2 / 2 (k3 is in
    `summary`): estimates of KL(behavior || proximal). `staleness_k1`, `staleness_k3`: the same of log current /
    proximal. `difference_max`: largest |p - q| of the proximal and the behavior probability. `correlation`: of the two
    log-probs over the tokens, NaN when one does not vary. `same`: of the tokens that were not certain (`unsure` many),
    the share whose discrepancy is exactly 1, NaN without any.
    """
    ratios, kept = LogRatios.of(tokens), tokens.finite
    proximal, behavior = tokens.proximal[kept].astype(np.float64), tokens.behavior[kept].astype(np.float64)
    unsure = behavior < -SURE
    apart = np.abs(np.exp(np.minimum(proximal, 0.0)) - np.exp(np.minimum(behavior, 0.0)))
    return {
        "discrepancy_k1": _mean(-ratios.discrepancy),
        "discrepancy_k2": _mean(ratios.discrepancy**2 / 2),
        "staleness_k1": _mean(-ratios.staleness),
        "staleness_k3": _mean(_k3(ratios.staleness)),
        "difference_max": float(apart.max(initial=0.0)),
        "correlation": correlation(proximal, behavior),
        "unsure": float(unsure.sum()),
        "same": float((ratios.discrepancy[unsure] == 0.0).mean()) if unsure.any() else float("nan"),
    }


def by_staleness(tokens: Tokens, of: Callable[[Tokens], dict[str, float]] = summary) -> dict[int, dict[str, float]]:
    """Staleness -> what `of` says of its tokens."""
    return {int(s): of(tokens.at(int(s))) for s in np.unique(tokens.staleness)}


def effective_sample_share(tokens: Tokens) -> float:
    """ESS / N of the total ratios of all tokens: 1 when every weight is equal (docs/paper.md, "ESS")."""
    return ess_share(np.nan_to_num(tokens.current.astype(np.float64) - tokens.behavior, nan=-np.inf))


def ess_share(log_weights: Array) -> float:
    """(sum w)^2 / (N sum w^2); the weights' scale does not matter, one of -inf has weight 0. NaN without any weight."""
    if not len(log_weights) or not np.isfinite(log_weights.max()):
        return float("nan")
    weights = np.exp(log_weights - log_weights.max())
    return float(weights.sum() ** 2 / (weights**2).sum() / len(weights))


def correlation(a: Array, b: Array) -> float:
    """Pearson's; NaN when one of them does not vary."""
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
    return float(values.mean()) if len(values) else 0.0
