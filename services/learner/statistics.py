"""What the tokens of a batch say about discrepancy and staleness. Pure; docs/paper.md, "metrics".

Everything is kept apart by staleness, because that is where a wrong proximal shows: with the exact one the discrepancy
does not depend on staleness, with a surrogate it does.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
BOUND = 20.0
"""Log-ratios are clamped to +-20 nats before they are averaged."""


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


_ARRAYS = (
    "staleness", "behavior", "proximal", "current", "old", "entropy", "advantages", "masked", "clipped",
)  # fmt: skip


def by_staleness(tokens: Tokens) -> dict[int, dict[str, float]]:
    """Staleness -> count and means over its tokens."""
    return {int(s): summary(tokens.at(int(s))) for s in np.unique(tokens.staleness)}


def summary(tokens: Tokens) -> dict[str, float]:
    """Count and means over the tokens. Log-ratios leave out tokens that are not finite or have no proximal;
    `nonfinite` and `missing` count those."""
    sound = np.isfinite(tokens.proximal) & np.isfinite(tokens.behavior) & np.isfinite(tokens.current)
    finite = sound & ~tokens.missing
    discrepancy = np.clip(tokens.proximal[finite].astype(np.float64) - tokens.behavior[finite], -BOUND, BOUND)
    staleness_ratio = np.clip(tokens.current[finite].astype(np.float64) - tokens.proximal[finite], -BOUND, BOUND)
    return {
        "tokens": float(len(tokens.staleness)),
        "log_discrepancy": _mean(discrepancy),
        "log_discrepancy_abs": _mean(np.abs(discrepancy)),
        "discrepancy_k3": _mean(np.expm1(discrepancy) - discrepancy),
        "log_staleness_ratio": _mean(staleness_ratio),
        "log_staleness_ratio_abs": _mean(np.abs(staleness_ratio)),
        "log_total_ratio_abs": _mean(np.abs(discrepancy + staleness_ratio)),
        "masked": _mean(tokens.masked),
        "clipped": _mean(tokens.clipped),
        "entropy": _mean(tokens.entropy),
        "nonfinite": float((~sound & ~tokens.missing).sum()),
        "missing": float(tokens.missing.sum()),
    }


def effective_sample_share(tokens: Tokens) -> float:
    """ESS / N of the total ratios of all tokens: 1 when every weight is equal (docs/paper.md, "ESS")."""
    log_ratio = np.nan_to_num(tokens.current.astype(np.float64) - tokens.behavior, nan=-np.inf)
    if not len(log_ratio) or not np.isfinite(log_ratio.max()):
        return float("nan")
    weights = np.exp(log_ratio - log_ratio.max())  # ESS does not depend on scale
    return float(weights.sum() ** 2 / (weights**2).sum() / len(weights))


def _mean(values: Array) -> float:
    return float(values.mean()) if len(values) else 0.0
