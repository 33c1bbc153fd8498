"""Decide whether an engine computes the published version. Pure. Source: docs/paper.md, "canary".

Two tests. Error: the mean |engine - learner| over the compared tokens is within a multiple of the learner's own
rounding noise, measured on the same tokens. Leaning: the engine's deviations are not proportional to the change by the
last step. An engine that kept a share of the previous weights deviates by that share of the change, which the
regression finds even where the change is smaller than the rounding.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from palimpsest.common.snapshots.manifest import Canary

NOISE_FACTOR, SMALL_SAMPLE = 4.0, 10.0
"""The tolerance is (NOISE_FACTOR + SMALL_SAMPLE / sqrt(tokens)) times the learner's noise: two engines of one precision
differ by up to the sum of their noises, and a mean over few tokens varies more."""
LEAST_TOLERANCE = 0.005
"""Lower limit of a tolerance that follows from the noise, in nats."""
DEFAULT_TOLERANCE = 0.03
"""Tolerance in nats where the noise is unknown (a manifest of an earlier release)."""
LEANING = 6.0
"""Limit of the leaning, in standard errors. With LEAST_EFFECTIVE_GROUPS, one false alarm in 80,000 versions (Student's
t with 15 degrees of freedom)."""
OUTLYING = 3.0
"""Multiple of the median change at which a token's change is limited as an instrument."""
LEAST_TOKENS, LEAST_EFFECTIVE_GROUPS = 24, 16.0
"""The leaning is tested from this number of tokens on, and of groups that carry the change: 1 / sum of squared
leverages."""
MATERIAL = 0.25
"""A smaller share of the change is not reported: rounding that depends on the token can produce it."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Result of the two tests."""

    error: float
    """Mean |engine - learner| in nats; infinite if a score is missing or not finite."""
    tolerance: float
    """Limit of the error, in nats."""
    leaning: float
    """Share of the last step's change that the engine lacks, in standard errors; 0 if it cannot be tested."""
    stale: float
    """That share itself, 0 for a correct engine and 1 for one that holds the previous version."""
    detectable: float
    """Smallest such share that this test would refuse; infinite if it cannot be tested."""

    @property
    def accepted(self) -> bool:
        """Whether the worker may sample with the version."""
        return self.error <= self.tolerance and not self.leans

    @property
    def leans(self) -> bool:
        """Whether the leaning test refuses the version."""
        return self.leaning > LEANING and self.stale > MATERIAL

    @property
    def has_power(self) -> bool:
        """Whether the leaning test would refuse an engine that holds the previous version."""
        return self.detectable <= 1.0

    def reason(self) -> str:
        """Why the version was refused, and the likely cause."""
        if self.error > self.tolerance:
            return (
                f"canary error {self.error:.4f} nats exceeds the tolerance {self.tolerance:.4f} nats "
                f"(rollout.canary_tolerance). The engine does not compute what the learner published: "
                f"its weight update is broken, or its precision differs from the learner's"
            )
        return (
            f"the canaries lean toward the previous weights by {self.leaning:.1f} standard errors "
            f"(limit {LEANING:.0f}): the engine lacks {self.stale:.0%} of the last step's change. "
            f"Part of the engine still computes with the previous weights: its weight update is broken"
        )


def judge(scores: Sequence[Sequence[float]], canaries: Sequence[Canary], *, tolerance: float | None = None) -> Verdict:
    """Test an engine's scores.

    scores: scores[i] holds the engine's log-probs of canaries[i].tokens[1:], in nats. tolerance: in nats; None derives
    it from the learner's noise.

    >>> canary = Canary((1, 2, 3), (2,), (-1.0,), ())
    >>> judge([[-9.0, -1.25]], [canary], tolerance=0.1).error
    0.25
    """
    if any(len(row) != len(canary.tokens) - 1 for row, canary in zip(scores, canaries, strict=True)):
        return _refusal(tolerance)
    engine = _flat([[row[p - 1] for p in canary.positions] for row, canary in zip(scores, canaries, strict=True)])
    learner = _flat([canary.logprobs for canary in canaries])
    if not len(engine) or not np.isfinite(engine).all():
        return _refusal(tolerance)
    float32 = _flat([canary.float32 for canary in canaries])
    previous = _flat([canary.previous for canary in canaries])
    error = float(np.abs(engine - learner).mean())
    if len(float32) != len(learner):
        return Verdict(error, DEFAULT_TOLERANCE if tolerance is None else tolerance, 0.0, 0.0, math.inf)
    if tolerance is None:
        tolerance = tolerance_for(float(np.abs(learner - float32).mean()), len(learner))
    if len(previous) != len(learner):
        return Verdict(error, tolerance, 0.0, 0.0, math.inf)
    targets = np.array([canary.tokens[p] for canary in canaries for p in canary.positions], dtype=np.int64)
    stale, deviation = stale_share(engine, learner, float32, previous, targets)
    leaning = stale / deviation if math.isfinite(deviation) else 0.0
    return Verdict(error, tolerance, leaning, stale, max(LEANING * deviation, MATERIAL))


def tolerance_for(noise: float, tokens: int) -> float:
    """Return the largest accepted error in nats. noise: mean |learner - float32| over `tokens` tokens, in nats."""
    return max(LEAST_TOLERANCE, noise * (NOISE_FACTOR + SMALL_SAMPLE / math.sqrt(tokens)))


def stale_share(
    engine: NDArray[np.float64],
    learner: NDArray[np.float64],
    float32: NDArray[np.float64],
    previous: NDArray[np.float64],
    targets: NDArray[np.int64],
) -> tuple[float, float]:
    """Estimate which share of the last step's change the engine lacks, and its standard error.

    Arrays of shape [tokens], in nats except for the token ids `targets`: the log-probs of the engine, of the learner in
    its precision, in float32, and in float32 under the previous weights.

    The engine's deviation from float32 is regressed on the change, beside a constant, the log-prob itself and the
    learner's own rounding, which absorb what rounding does to every engine alike. The instrument is the change, limited
    to OUTLYING times its median. Tokens with the same id form a group: trajectories of one task repeat contexts, and
    with them the rounding. The standard error allows for that (CR3; Bell and McCaffrey, 2002), so no single group can
    carry the result. It is infinite where too few groups carry the change.
    """
    others = _orthonormal([np.ones_like(float32), float32, learner - float32])
    change, deviation = _without(others, previous - float32), _without(others, engine - float32)
    limit = OUTLYING * float(np.median(np.abs(change)))
    instrument = _without(others, np.clip(change, -limit, limit))
    total, product = float((instrument**2).sum()), float((instrument * change).sum())
    if len(change) < LEAST_TOKENS or product <= 0:
        return 0.0, math.inf
    group = np.unique(targets, return_inverse=True)[1]
    leverage = np.bincount(group, instrument**2) / total
    if (leverage**2).sum() * LEAST_EFFECTIVE_GROUPS > 1:
        return 0.0, math.inf
    share = float((instrument * deviation).sum()) / product
    rest = np.bincount(group, instrument * (deviation - share * change)) / (1.0 - leverage)
    return share, math.sqrt(float((rest**2).sum())) / product


def _without(basis: Sequence[NDArray[np.float64]], values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The values less their projection on an orthonormal basis."""
    for other in basis:
        values = values - (other * values).sum() * other
    return values


def _orthonormal(columns: Sequence[NDArray[np.float64]]) -> list[NDArray[np.float64]]:
    """An orthonormal basis of the columns' span (Gram-Schmidt). Columns that depend on earlier ones are left out."""
    basis: list[NDArray[np.float64]] = []
    for column in columns:
        rest = _without(basis, _without(basis, column))  # the second removes what rounding left
        length = math.sqrt((rest**2).sum())
        if length > 1e-9 * math.sqrt((column**2).sum()):
            basis.append(rest / length)
    return basis


def _refusal(tolerance: float | None) -> Verdict:
    return Verdict(math.inf, DEFAULT_TOLERANCE if tolerance is None else tolerance, 0.0, 0.0, math.inf)


def _flat(values: Sequence[Sequence[float]]) -> NDArray[np.float64]:
    return np.array([value for row in values for value in row], dtype=np.float64)
