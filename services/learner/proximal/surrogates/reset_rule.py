"""Reset of the moving average: a decision from the active share of each version. Pure.

The active share is the share of trainable tokens that are neither masked nor clipped. `paper` resets whenever it is
below a threshold. The healthy share depends on clip, band and staleness: a fixed threshold can exceed the share that
exact old log-probs reach, and then every version resets. `guarded` compares with the level of the run itself, requires
several versions in a row, and waits after a reset until the average has regained its age.
"""

import math
import statistics
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Literal

HEALTHY_VERSIONS = 8
"""The healthy level is the median over this number of first healthy versions."""


class Cause(StrEnum):
    """Cause of a reset."""

    BELOW_THRESHOLD = "below_threshold"
    """The active share of one version is below the threshold (paper)."""
    BELOW_HEALTHY_LEVEL = "below_healthy_level"
    """The share of several versions in a row is below the healthy level (guarded)."""


@dataclass(frozen=True, slots=True)
class Rule:
    """When to reset; names and meanings are those of the learner.proximal section."""

    reset: Literal["off", "paper", "guarded"]
    threshold: float
    patience: int
    cooldown: int
    trigger: Literal["active", "mask"] = "active"
    """Share that the rule compares: `active`: tokens neither masked nor clipped; `mask`: tokens not masked."""


@dataclass(frozen=True, slots=True)
class ResetState:
    """State of the decision."""

    healthy: tuple[float, ...] = ()
    """Shares of the first healthy versions."""
    low: int = 0
    """Number of latest versions in a row that were below."""
    since: int | None = None
    """Versions since the last reset; None without a reset."""

    @property
    def level(self) -> float | None:
        """Healthy level; None before the first healthy version."""
        return statistics.median(self.healthy) if self.healthy else None


def decide(seen: ResetState, active_share: float, rule: Rule) -> tuple[ResetState, Cause | None]:
    """Return the next state, and the cause of a reset, or None.

    active_share: share of the version just trained (see Rule.trigger), in [0, 1]; NaN (no trainable token) never
    resets. Raises ValueError for another value.

    >>> decide(Seen(), 0.85, Rule("paper", threshold=0.9, patience=3, cooldown=8))[1]
    <Cause.BELOW_THRESHOLD: 'below_threshold'>
    """
    if not (math.isnan(active_share) or 0 <= active_share <= 1):
        raise ValueError(f"the active share is {active_share}; it must be in [0, 1]")
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
