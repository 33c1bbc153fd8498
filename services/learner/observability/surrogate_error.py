"""The error of a surrogate, on tokens whose old log-probs are known too (docs/algorithms/audit.md). Pure.

Let e = surrogate - old, the leak. Then for every token

    log surrogate/behavior = log discrepancy + e        log current/surrogate = log staleness ratio - e

Their sum is the same and only the split is wrong: what leaks is taken from one constraint and given to the other.
Each constraint is judged by itself, as if the other were off; `removed_wrongly` and `trained_wrongly` judge both.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from palimpsest.services.learner.observability.token_statistics import correlation, log_ratio
from palimpsest.services.learner.observability.token_table import TokenTable

Array = NDArray[Any]
OF_MASK, OF_CLIP = ("masked_wrongly", "kept_wrongly"), ("clipped_wrongly", "unclipped_wrongly")
OF_BOTH = ("removed_wrongly", "trained_wrongly")
AT_STALENESS = ("tokens", "leak_mean", "leak_rms", *OF_BOTH)
"""What the record holds for each staleness."""


@dataclass(frozen=True, slots=True)
class AuditedTokens:
    """Trainable tokens whose surrogate and old log-probs are known; arrays are [tokens], log-probs in nats."""

    staleness: Array
    behavior: Array
    surrogate: Array
    """The log-prob that was used as the proximal."""
    old: Array
    """Exact."""
    current: Array
    advantages: Array

    @classmethod
    def joined(cls, parts: "Sequence[AuditedTokens]") -> "AuditedTokens":
        """Concatenate the parts."""
        return cls(*(np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(cls)))

    def where(self, chosen: Array) -> "AuditedTokens":
        """The tokens where `chosen` (bool, [tokens]) is True."""
        return AuditedTokens(*(getattr(self, f.name)[chosen] for f in fields(self)))


@dataclass(frozen=True, slots=True)
class Thresholds:
    """The two constraints; None: that one is off. Raises ValueError for numbers that are no bounds of a ratio."""

    band: float | None
    """c: masked when the discrepancy is outside [1/c, c]."""
    clip_low: float | None
    """Clipped below 1 - clip_low when the advantage is negative."""
    clip_high: float | None
    """Clipped above 1 + clip_high when the advantage is positive."""

    def __post_init__(self) -> None:
        if self.band is not None and self.band <= 1:
            raise ValueError(f"a band of {self.band} lets nothing through: give a number above 1, or None")
        if self.clip_low is not None and not 0 <= self.clip_low <= 1:
            raise ValueError(f"clip_low is {self.clip_low}: a ratio is clipped at 1 - clip_low, so it is in [0, 1]")
        if self.clip_high is not None and self.clip_high <= 0:
            raise ValueError(f"clip_high is {self.clip_high}: a ratio is clipped at 1 + clip_high, so it is above 0")


def masked(proximal: Array, behavior: Array, thresholds: Thresholds) -> NDArray[np.bool_]:
    """Whether the band removes each token with this proximal; bool, [tokens]."""
    if thresholds.band is None:
        return np.zeros(proximal.shape, dtype=np.bool_)
    outside: NDArray[np.bool_] = np.abs(log_ratio(proximal, behavior)) > np.log(thresholds.band)
    return outside


def clipped(current: Array, proximal: Array, advantages: Array, thresholds: Thresholds) -> NDArray[np.bool_]:
    """Whether the clip removes the gradient of each token with this proximal; bool, [tokens]."""
    log_update = log_ratio(current, proximal)
    gone = np.zeros(proximal.shape, dtype=np.bool_)
    if thresholds.clip_high is not None:
        gone |= (advantages > 0) & (log_update > np.log1p(thresholds.clip_high))
    if thresholds.clip_low is not None and thresholds.clip_low < 1:  # a ratio is never below 0
        gone |= (advantages < 0) & (log_update < np.log1p(-thresholds.clip_low))
    return gone


def surrogate_error(tokens: AuditedTokens, thresholds: Thresholds) -> dict[str, float]:
    """Counts, means and shares over the tokens; NaN where there is nothing to take a mean of.

    `nonfinite` counts tokens with a number that is not finite; everything else leaves them out.
    `leak_mean`, `leak_rms`: of e, nats. `correlation`: of the log-discrepancy seen with the true one, over the tokens;
    NaN where one of them is a constant (bypass: always 0).
    `masked_wrongly`: share of the tokens masked though their true discrepancy is inside the band; `kept_wrongly`: the
    other way round. `clipped_wrongly`, `unclipped_wrongly`: the same of the clip. `removed_wrongly`: masked or clipped
    though neither is due; `trained_wrongly`: neither though one is due.
    """
    finite = np.all([np.isfinite(getattr(tokens, f.name)) for f in fields(tokens)], axis=0)
    kept = tokens.where(finite)
    leaked = log_ratio(kept.surrogate, kept.old)
    masks = masked(kept.surrogate, kept.behavior, thresholds), masked(kept.old, kept.behavior, thresholds)
    clips = (
        clipped(kept.current, kept.surrogate, kept.advantages, thresholds),
        clipped(kept.current, kept.old, kept.advantages, thresholds),
    )
    gone = masks[0] | clips[0], masks[1] | clips[1]
    return {
        "tokens": float(len(finite)),
        "nonfinite": float((~finite).sum()),
        "leak_mean": _mean(leaked),
        "leak_rms": _mean(leaked**2) ** 0.5,
        "correlation": correlation(log_ratio(kept.surrogate, kept.behavior), log_ratio(kept.old, kept.behavior)),
        "masked_wrongly": _mean(masks[0] & ~masks[1]),
        "kept_wrongly": _mean(~masks[0] & masks[1]),
        "clipped_wrongly": _mean(clips[0] & ~clips[1]),
        "unclipped_wrongly": _mean(~clips[0] & clips[1]),
        "removed_wrongly": _mean(gone[0] & ~gone[1]),
        "trained_wrongly": _mean(~gone[0] & gone[1]),
    }


def leak_by_staleness(tokens: AuditedTokens, thresholds: Thresholds) -> dict[int, dict[str, float]]:
    """Staleness -> `surrogate_error` of its tokens."""
    return {
        int(staleness): surrogate_error(tokens.where(tokens.staleness == staleness), thresholds)
        for staleness in np.unique(tokens.staleness)
    }


def surrogate_error_record(batch: TokenTable, thresholds: Thresholds) -> dict[str, Any] | None:
    """The version's record: `surrogate_error` over the audited tokens, and `by_staleness` with some of its numbers.

    None when the version was not audited. Shares of a constraint that is off, or that does not judge single tokens, are
    None: `masked_wrongly` and `kept_wrongly` without a band, `clipped_wrongly` and `unclipped_wrongly` without a clip,
    the other two without either.
    """
    if not batch.audited.any():
        return None
    audited = audited_tokens(batch)
    unjudged: tuple[str, ...] = ()
    no_clip = thresholds.clip_low is None and thresholds.clip_high is None
    if thresholds.band is None:
        unjudged += OF_MASK
    if no_clip:
        unjudged += OF_CLIP
    if thresholds.band is None and no_clip:
        unjudged += OF_BOTH
    silent = dict.fromkeys(unjudged)
    by_staleness = {
        str(staleness): {name: values[name] for name in AT_STALENESS if name not in silent}
        for staleness, values in leak_by_staleness(audited, thresholds).items()
    }
    return surrogate_error(audited, thresholds) | silent | {"by_staleness": by_staleness}


def audited_tokens(batch: TokenTable) -> AuditedTokens:
    """The tokens whose surrogate and old log-probs are both known."""
    tokens = batch.tokens.where(batch.audited & ~np.isnan(batch.tokens.old))
    return AuditedTokens(
        staleness=tokens.staleness,
        behavior=tokens.behavior,
        surrogate=tokens.proximal,
        old=tokens.old,
        current=tokens.current,
        advantages=tokens.advantages,
    )


def _mean(values: Array) -> float:
    return float(values.mean()) if len(values) else float("nan")
