"""Tokens that masks and clips remove from the loss of a batch, by cause. Pure.

The marginal count of a cause is the number of tokens that it removes, alone or with others. The exclusive count is the
number of tokens that no other cause removes.

    sum of exclusive + overlap = removed = sum of marginals - repeats        removed + active = tokens
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from palimpsest.services.learner.observability.surrogate_error import Thresholds, clipped
from palimpsest.services.learner.observability.token_statistics import Tokens

Array = NDArray[Any]
CLIPS = ("clip_high", "clip_low", "dual", "mask_high", "mask_low", "opsm", "ratio_bound")
"""Causes from the objective. All others are masks of the correction."""
TOKEN_MASKS = (
    "band_high", "band_low", "tokens_high", "tokens_low", "difference", "k1_token", "k2_token", "k3_token", "m2",
)  # fmt: skip
"""Masks that decide on each token from its own values."""
NO_CURRENT = "current_nonfinite"
"""Cause for tokens whose current log-prob is not finite: no rule removes them, but they have no loss."""


def removal(tokens: Tokens, thresholds: Thresholds) -> dict[str, Any]:
    """Return counts of removed tokens, and the removed shares of the advantages.

    Counts: `tokens`, `active` (neither masked nor clipped, with a loss), `removed`, `overlap` (removed by more than one
    cause), `repeats` (sum over tokens of the causes beyond the first), `masked` and `clipped` (by any mask, by any
    clip); `causes`: cause -> [marginal, exclusive]; `masked_past_clip`: masked tokens that the clip would also remove
    (a clip only acts on tokens that no mask removes), None if the objective has no clip of tokens.

    Removed shares, None if the denominator is 0: `advantage`: of the sum of |A|; `positive`, `negative`: of the tokens
    with A > 0 and with A < 0. A clip that bounds the gradient without removing it (CISPO) counts as removing.
    """
    causes = _causes(tokens)
    times = np.sum(list(causes.values()), axis=0) if causes else np.zeros(len(tokens.staleness), dtype=np.int64)
    removed, masked = times > 0, _any(causes, [n for n in causes if n not in (*CLIPS, NO_CURRENT)], len(times))
    weight = np.abs(np.nan_to_num(tokens.advantages.astype(np.float64)))
    past = None
    if thresholds.clip_high is not None or thresholds.clip_low is not None:
        past = clipped(tokens.current, tokens.proximal, tokens.advantages, thresholds) & tokens.finite
    return {
        "tokens": len(times),
        "active": int((~removed).sum()),
        "removed": int(removed.sum()),
        "overlap": int((times > 1).sum()),
        "repeats": int(np.maximum(times - 1, 0).sum()),
        "masked": int(masked.sum()),
        "clipped": int(_any(causes, [name for name in causes if name in CLIPS], len(times)).sum()),
        "masked_past_clip": None if past is None else int((masked & past).sum()),
        "advantage": float(weight[removed].sum() / weight.sum()) if weight.sum() else None,
        "positive": _share(removed, tokens.advantages > 0),
        "negative": _share(removed, tokens.advantages < 0),
        "causes": {name: [int(gone.sum()), int((gone & (times == 1)).sum())] for name, gone in causes.items()},
    }


def token_masked(tokens: Tokens) -> float | None:
    """Return the share of tokens removed by masks of single tokens (TOKEN_MASKS); None without tokens.

    Masks of trajectories and tokens without a number do not count.
    """
    if not len(tokens.staleness):
        return None
    names = [name for name in tokens.causes if name in TOKEN_MASKS]
    return float(_any(dict(tokens.causes), names, len(tokens.staleness)).mean())


def past_clip(tokens: Tokens, thresholds: Thresholds) -> float | None:
    """Return the share of tokens whose total ratio is past the clip on the side of their advantage.

    A clip on the total ratio would remove them. None if the objective has no clip of tokens, or without tokens.
    """
    if (thresholds.clip_high is None and thresholds.clip_low is None) or not len(tokens.staleness):
        return None
    past = clipped(tokens.current, tokens.behavior, tokens.advantages, thresholds) & tokens.finite
    return float(past.mean())


def _causes(tokens: Tokens) -> dict[str, Array]:
    gone = ~np.isfinite(tokens.current)
    own = {NO_CURRENT: gone} if gone.any() else {}
    return {name: np.asarray(removed, dtype=np.bool_) for name, removed in tokens.causes.items()} | own


def _any(causes: dict[str, Array], names: list[str], length: int) -> Array:
    chosen = [causes[name] for name in names]
    found: Array = np.any(chosen, axis=0) if chosen else np.zeros(length, dtype=np.bool_)
    return found


def _share(removed: Array, of: Array) -> float | None:
    return float(removed[of].mean()) if of.any() else None
