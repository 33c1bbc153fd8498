"""What an audited batch says of its surrogate, for a line of history.jsonl. Pure; the arithmetic is leak.py's."""

from typing import Any

import numpy as np

from services.learner.flat import Flat
from services.learner.leak import Audited, Thresholds, leak, leak_by_staleness

OF_MASK, OF_CLIP = ("masked_wrongly", "kept_wrongly"), ("clipped_wrongly", "unclipped_wrongly")
OF_BOTH = ("removed_wrongly", "trained_wrongly")
AT_STALENESS = ("tokens", "leak_mean", "leak_rms", *OF_BOTH)
"""What is told of each staleness."""


def leaks(batch: Flat, thresholds: Thresholds) -> dict[str, Any] | None:
    """Over the tokens whose old log-prob was scored beside the surrogate's; None when the batch was not audited.

    leak.py's numbers, and `by_staleness` with some of them. Shares of a constraint that is off, or that is none of
    single tokens, are None: `masked_wrongly` and `kept_wrongly` without a band, `clipped_wrongly` and
    `unclipped_wrongly` without a clip, the other two without either.
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
    return leak(audited, thresholds) | silent | {"by_staleness": by_staleness}


def audited_tokens(batch: Flat) -> Audited:
    """Those of which both are known."""
    tokens = batch.tokens.where(batch.audited & ~np.isnan(batch.tokens.old))
    return Audited(
        staleness=tokens.staleness,
        behavior=tokens.behavior,
        surrogate=tokens.proximal,
        old=tokens.old,
        current=tokens.current,
        advantages=tokens.advantages,
    )
