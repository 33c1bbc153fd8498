"""What the tokens of a batch say about discrepancy and staleness. Pure; docs/paper.md, "metrics".

Everything is kept apart by staleness, because that is where a wrong proximal shows: with the exact one the discrepancy
does not depend on staleness, with a surrogate it does.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
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
    entropy: Array
    advantages: Array
    masked: Array
    clipped: Array

    @classmethod
    def joined(cls, parts: "Sequence[Tokens]") -> "Tokens":
        """All of them in one."""
        return cls(*(np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(cls)))

    def at(self, staleness: int) -> "Tokens":
        """Those of this staleness."""
        chosen = self.staleness == staleness
        return Tokens(*(getattr(self, f.name)[chosen] for f in fields(self)))


def by_staleness(tokens: Tokens) -> dict[int, dict[str, float]]:
    """Staleness -> count and means over its tokens."""
    return {int(s): summary(tokens.at(int(s))) for s in np.unique(tokens.staleness)}


def summary(tokens: Tokens) -> dict[str, float]:
    """Count and means over the tokens. Log-ratios leave out tokens that are not finite; `nonfinite` counts those."""
    finite = np.isfinite(tokens.proximal) & np.isfinite(tokens.behavior) & np.isfinite(tokens.current)
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
        "nonfinite": float((~finite).sum()),
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
