"""When a moving average is begun anew: a decision from the active share, version by version. Pure.

The active share counts, of all trainable tokens, those neither masked nor clipped. `paper` resets whenever it is below
a threshold. What share is healthy depends on clip, band and staleness, so a fixed threshold can lie above what even
exact old log-probs reach, and then resets at every version; `guarded` compares with the run's own level, waits for
several versions in a row, and not again soon: after a reset the average has to grow its age first.
"""

import math
import statistics
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Literal

HEALTHY_VERSIONS = 8
"""The healthy level is the median over the first so many healthy versions."""


class Cause(StrEnum):
    """Why it was reset."""

    BELOW_THRESHOLD = "below_threshold"
    """The active share of one version (paper)."""
    BELOW_HEALTHY_LEVEL = "below_healthy_level"
    """The active share of several versions in a row (guarded)."""


@dataclass(frozen=True, slots=True)
class Rule:
    """When to reset; names and meaning as in the learner.proximal section."""

    reset: Literal["off", "paper", "guarded"]
    threshold: float
    patience: int
    cooldown: int


@dataclass(frozen=True, slots=True)
class ResetState:
    """What the decision remembers."""

    healthy: tuple[float, ...] = ()
    """Active shares of the first healthy versions."""
    low: int = 0
    """Versions in a row, up to now, that were below."""
    since: int | None = None
    """Versions since the last reset; None: there was none."""

    @property
    def level(self) -> float | None:
        """Healthy level; None before the first version."""
        return statistics.median(self.healthy) if self.healthy else None


def decide(seen: ResetState, active_share: float, rule: Rule) -> tuple[ResetState, Cause | None]:
    """What to remember, and the cause when it is to be reset now.

    active_share: of the version just trained, in [0, 1]; NaN when it had no trainable token, which decides nothing.
    Raises ValueError for any other number.

    >>> decide(Seen(), 0.85, Rule("paper", threshold=0.9, patience=3, cooldown=8))[1]
    <Cause.BELOW_THRESHOLD: 'below_threshold'>
    """
    if not (math.isnan(active_share) or 0 <= active_share <= 1):
        raise ValueError(f"an active share of {active_share} cannot be: it is in [0, 1]")
    seen = replace(seen, since=None if seen.since is None else seen.since + 1)
    if rule.reset == "off" or math.isnan(active_share):
        return seen, None
    if rule.reset == "paper":
        return _reset(seen, Cause.BELOW_THRESHOLD) if active_share < rule.threshold else (seen, None)
    seen = _judged(seen, active_share, rule.threshold)
    rested = seen.since is None or seen.since > rule.cooldown
    return _reset(seen, Cause.BELOW_HEALTHY_LEVEL) if seen.low >= rule.patience and rested else (seen, None)


def _judged(seen: ResetState, active_share: float, threshold: float) -> ResetState:
    if seen.level is not None and active_share < threshold * seen.level:
        return replace(seen, low=seen.low + 1)
    healthy = seen.healthy if len(seen.healthy) == HEALTHY_VERSIONS else (*seen.healthy, active_share)
    return replace(seen, healthy=healthy, low=0)


def _reset(seen: ResetState, cause: Cause) -> tuple[ResetState, Cause]:
    return replace(seen, low=0, since=0), cause
