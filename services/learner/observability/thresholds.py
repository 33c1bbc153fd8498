"""Bounds that a run's rules compare ratios with, as numbers for the metrics. Pure."""

from dataclasses import dataclass

from palimpsest.common.config.learner import LearnerConfig
from palimpsest.common.config.objective import DiscrepancyConfig
from palimpsest.common.config.proximal import PROXIMAL_KINDS
from palimpsest.services.learner.observability.surrogate_error import Thresholds

TOKEN_CLIPS = ("clipped", "minirl")
"""Objectives that clip each token by the sign of its advantage."""


@dataclass(frozen=True, slots=True)
class RunThresholds:
    """Kind, objective and bounds of a run. A bound is None if the run has no such bound."""

    kind: str
    """The configured learner.proximal.kind."""
    objective: str
    thresholds: Thresholds
    weight_low: float | None
    """Lower bound on the weight of a token in the loss."""
    weight_high: float | None
    """Upper bound on the weight of a token in the loss."""
    of_sequence: bool
    """Whether all tokens of a trajectory share one weight."""

    @property
    def exact(self) -> bool:
        """Whether the configured kind gives old log-probs, not a surrogate."""
        return PROXIMAL_KINDS[self.kind].exact

    @classmethod
    def of(cls, config: LearnerConfig) -> "RunThresholds":
        """Return the thresholds of a configuration."""
        loss, discrepancy = config.loss, config.discrepancy
        clips = loss.objective in TOKEN_CLIPS
        return cls(
            kind=config.proximal.kind,
            objective=loss.objective,
            thresholds=Thresholds(
                band=_band(discrepancy),
                clip_low=loss.clip_low if clips else None,
                clip_high=loss.clip_high if clips else None,
            ),
            weight_low=discrepancy.weight_low if discrepancy.weight == "clipped" else None,
            weight_high=discrepancy.weight_high if discrepancy.weight in ("clipped", "truncated") else None,
            of_sequence=discrepancy.weight_level == "sequence",
        )


def _band(config: DiscrepancyConfig) -> float | None:
    """Return the symmetric band on the discrepancy of tokens; None without one."""
    if not isinstance(config.band, str):
        return config.band
    if not isinstance(config.tokens, str):
        low, high = config.tokens
        if high > 1 and abs(low * high - 1) < 1e-9:
            return high
    return None
