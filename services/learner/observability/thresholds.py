"""What a run's rules compare ratios with, as plain numbers for the metrics. Pure but for reading the configuration."""

from dataclasses import dataclass

from palimpsest.common.config.learner import LearnerConfig
from palimpsest.common.config.objective import DiscrepancyConfig
from palimpsest.common.config.proximal import PROXIMAL_KINDS
from palimpsest.services.learner.observability.surrogate_error import Thresholds

TOKEN_CLIPS = ("clipped", "minirl")
"""Objectives that clip each token by the sign of its advantage."""


@dataclass(frozen=True, slots=True)
class RunThresholds:
    """None: there is no such bound."""

    kind: str
    """Of the proximal, as configured."""
    objective: str
    thresholds: Thresholds
    weight_low: float | None
    """Least weight that a token of the loss may have."""
    weight_high: float | None
    """Greatest."""
    of_sequence: bool
    """Whether a weight is a whole trajectory's."""

    @property
    def exact(self) -> bool:
        """Whether the configuration asks for old log-probs, not for a surrogate."""
        return PROXIMAL_KINDS[self.kind].exact

    @classmethod
    def of(cls, config: LearnerConfig) -> "RunThresholds":
        """Of a run."""
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
    """The symmetric band that tokens are held to, if there is one."""
    if not isinstance(config.band, str):
        return config.band
    if not isinstance(config.tokens, str):
        low, high = config.tokens
        if high > 1 and abs(low * high - 1) < 1e-9:
            return high
    return None
