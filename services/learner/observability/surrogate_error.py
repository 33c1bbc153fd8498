"""The error of a surrogate, on tokens with an exact old log-prob (docs/algorithms/audit.md). Pure.

Let e = surrogate - old, the leak. Then for every token

    log surrogate/behavior = log discrepancy + e        log current/surrogate = log staleness ratio - e

Their sum is correct and only the split is wrong: e moves from one constraint to the other. The shares below evaluate
each constraint as if the other were off; `removed_wrongly` and `trained_wrongly` evaluate both together.
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
"""Values of the record for each staleness."""


@dataclass(frozen=True, slots=True)
class AuditedTokens:
    """Trainable tokens with a surrogate and an exact old log-prob. Arrays are [tokens], log-probs in nats."""

    staleness: Array
    behavior: Array
    surrogate: Array
    """The proximal log-prob that was used."""
    old: Array
    """The exact old log-prob."""
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
    """The two constraints; None turns one off. Raises ValueError if a number is not a valid bound of a ratio."""

    band: float | None
    """c: masked when the discrepancy is outside [1/c, c]."""
    clip_low: float | None
    """Clipped below 1 - clip_low when the advantage is negative."""
    clip_high: float | None
    """Clipped above 1 + clip_high when the advantage is positive."""

    def __post_init__(self) -> None:
        if self.band is not None and self.band <= 1:
            raise ValueError(f"band is {self.band}; it must be above 1, or None")
        if self.clip_low is not None and not 0 <= self.clip_low <= 1:
            raise ValueError(
                f"clip_low is {self.clip_low}; it must be in [0, 1], because ratios are clipped at 1 - clip_low"
            )
        if self.clip_high is not None and self.clip_high <= 0:
            raise ValueError(
                f"clip_high is {self.clip_high}; it must be above 0, because ratios are clipped at 1 + clip_high"
            )


def masked(proximal: Array, behavior: Array, thresholds: Thresholds) -> NDArray[np.bool_]:
    """Return which tokens the band removes with this proximal; bool, [tokens]."""
    if thresholds.band is None:
        return np.zeros(proximal.shape, dtype=np.bool_)
    outside: NDArray[np.bool_] = np.abs(log_ratio(proximal, behavior)) > np.log(thresholds.band)
    return outside


def clipped(current: Array, proximal: Array, advantages: Array, thresholds: Thresholds) -> NDArray[np.bool_]:
    """Return the tokens whose gradient the clip removes with this proximal; bool, [tokens]."""
    log_update = log_ratio(current, proximal)
    gone = np.zeros(proximal.shape, dtype=np.bool_)
    if thresholds.clip_high is not None:
        gone |= (advantages > 0) & (log_update > np.log1p(thresholds.clip_high))
    if thresholds.clip_low is not None and thresholds.clip_low < 1:  # a ratio is never below 0
        gone |= (advantages < 0) & (log_update < np.log1p(-thresholds.clip_low))
    return gone


def surrogate_error(tokens: AuditedTokens, thresholds: Thresholds) -> dict[str, float]:
    """Return counts, means and shares over the tokens; NaN without tokens.

    `nonfinite` counts tokens with a number that is not finite; all other values leave them out.
    `leak_mean`, `leak_rms`: of e, nats. `correlation`: between the surrogate's log-discrepancy and the exact one, over
    the tokens; NaN if one of them is constant (bypass: always 0).
    `masked_wrongly`: share of tokens that are masked although their exact discrepancy is inside the band;
    `kept_wrongly`: not masked although it is outside. `clipped_wrongly`, `unclipped_wrongly`: the same for the clip.
    `removed_wrongly`: masked or clipped although exact values would remove neither way; `trained_wrongly`: neither
    masked nor clipped although exact values would remove the token.
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
    """Return the version's record: `surrogate_error` over the audited tokens, and the values AT_STALENESS by staleness.

    None if the version was not audited. Shares of a constraint that is off, or that does not decide on single tokens,
    are None: `masked_wrongly` and `kept_wrongly` without a band, `clipped_wrongly` and `unclipped_wrongly` without a
    clip, `removed_wrongly` and `trained_wrongly` without both.
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
    absent = dict.fromkeys(unjudged)
    by_staleness = {
        str(staleness): {name: values[name] for name in AT_STALENESS if name not in absent}
        for staleness, values in leak_by_staleness(audited, thresholds).items()
    }
    return surrogate_error(audited, thresholds) | absent | {"by_staleness": by_staleness}


def audited_tokens(batch: TokenTable) -> AuditedTokens:
    """Return the audited tokens with an exact old log-prob."""
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
