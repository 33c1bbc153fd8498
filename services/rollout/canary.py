"""Checks that the engine computes what the learner published. Pure. See docs/paper.md, "canary".

There are two checks. The first compares the mean difference between engine and learner over the canaries' tokens with
the tolerance. The second is a sign test: it checks whether the differences lean toward the previous weights. Rounding
errors have no preferred sign. An engine that still computes with previous weights somewhere (a packed output head, a
cache) leans toward them on most tokens, and the sign test detects this even if a step changes less than rounding does.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from palimpsest.common.snapshots.manifest import Canary

MOVED = 1e-3
"""The sign test ignores tokens whose log-prob the last step changed by less than this, in nats."""
MATERIAL = 0.25
"""The sign test ignores tokens on which the engine's error is below this share of the step's change."""
LEANING = 5.0
"""Limit of the sign test, in standard deviations: a correct engine exceeds it once in three million checks."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result of the canary checks of one version."""

    error: float
    """Mean |engine - learner|, nats; infinite when something is missing or not a number."""
    leaning: float
    """Lean toward the previous weights, in standard deviations; 0 if no token counts in the sign test."""
    tolerance: float

    @property
    def accepted(self) -> bool:
        """Whether the worker may serve the version."""
        return self.error <= self.tolerance and self.leaning <= LEANING

    def reason(self) -> str:
        """Return the reason for a refusal."""
        if self.error > self.tolerance:
            return (
                f"canary error {self.error:.4f} nats exceeds the tolerance {self.tolerance} nats "
                f"(rollout.canary_tolerance). The engine does not compute what the learner published: "
                f"its weight update is faulty, or its precision differs from the learner's"
            )
        return (
            f"the canaries lean toward the previous weights by {self.leaning:.1f} standard deviations "
            f"(the limit is {LEANING:.0f}): part of the engine still computes with them. Its weight update is faulty"
        )


def judge(scores: Sequence[Sequence[float]], canaries: Sequence[Canary], *, tolerance: float) -> Verdict:
    """Compare the engine's scores with the canaries.

    scores[i]: the engine's log-probs of canaries[i].tokens[1:], in nats.

    >>> canary = Canary((1, 2, 3), (2,), (-1.0,), ())
    >>> judge([[-9.0, -1.25]], [canary], tolerance=0.1).error
    0.25
    """
    differences: list[float] = []
    toward = away = 0
    for row, canary in zip(scores, canaries, strict=True):
        if len(row) != len(canary.tokens) - 1:
            return Verdict(math.inf, 0.0, tolerance)
        ours = [row[position - 1] for position in canary.positions]
        differences += [engine - learner for engine, learner in zip(ours, canary.logprobs, strict=True)]
        for engine, learner, previous in zip(ours, canary.logprobs, canary.previous, strict=False):
            move = previous - learner
            if abs(move) >= MOVED and abs(engine - learner) >= MATERIAL * abs(move):
                toward += (engine - learner) * move > 0
                away += (engine - learner) * move < 0
    error = sum(map(abs, differences)) / len(differences) if differences else math.inf
    counted = toward + away
    leaning = (toward - away) / math.sqrt(counted) if counted else 0.0
    return Verdict(error if math.isfinite(error) else math.inf, leaning, tolerance)
