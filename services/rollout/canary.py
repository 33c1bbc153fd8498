"""Does the engine compute what the learner published? Pure; docs/paper.md, "canary".

Two questions. Is the engine close to the learner: the mean difference over the canaries' tokens within the tolerance?
And does what difference there is lean towards the weights before these? Rounding leans neither way. An engine that kept
old weights somewhere (a packed output head, a cache) leans towards them on token after token, which a sign test sees
even where a step changes less than rounding does.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from palimpsest.common.snapshots.manifest import Canary

MOVED = 1e-3
"""Tokens that the last step moved by less, in nats, say nothing about whether it was taken on."""
MATERIAL = 0.25
"""Nor do tokens on which the engine is off by less than this share of the move."""
LEANING = 5.0
"""So many standard deviations of a fair coin are no accident: once in three million checks."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the canaries say of an engine."""

    error: float
    """Mean |engine - learner|, nats; infinite when something is missing or not a number."""
    leaning: float
    """Towards the previous weights, in standard deviations; 0 when too little moved to tell."""
    tolerance: float

    @property
    def accepted(self) -> bool:
        """Whether the version may be served."""
        return self.error <= self.tolerance and self.leaning <= LEANING

    def reason(self) -> str:
        """Why not."""
        if self.error > self.tolerance:
            return (
                f"on the canaries the engine is {self.error:.4f} nats off what the learner published, "
                f"{self.tolerance} are allowed (rollout.canary_tolerance). The engine does not compute these weights: "
                f"its update is broken, or its precision differs from the learner's"
            )
        return (
            f"on the canaries the engine leans towards the previous weights by {self.leaning:.1f} standard deviations "
            f"({LEANING:.0f} are allowed): part of it still computes with them. Its update is broken"
        )


def judge(scores: Sequence[Sequence[float]], canaries: Sequence[Canary], *, tolerance: float) -> Verdict:
    """scores[i]: the engine's log-probs of canaries[i].tokens after the first, nats.

    >>> canary = Canary((1, 2, 3), (2,), (-1.0,), ())
    >>> judge([[-9.0, -1.25]], [canary], tolerance=0.1).error
    0.25
    """
    differences: list[float] = []
    towards = away = 0
    for row, canary in zip(scores, canaries, strict=True):
        if len(row) != len(canary.tokens) - 1:
            return Verdict(math.inf, 0.0, tolerance)
        ours = [row[position - 1] for position in canary.positions]
        differences += [engine - learner for engine, learner in zip(ours, canary.logprobs, strict=True)]
        for engine, learner, previous in zip(ours, canary.logprobs, canary.previous, strict=False):
            move = previous - learner
            if abs(move) >= MOVED and abs(engine - learner) >= MATERIAL * abs(move):
                towards += (engine - learner) * move > 0
                away += (engine - learner) * move < 0
    error = sum(map(abs, differences)) / len(differences) if differences else math.inf
    told = towards + away
    leaning = (towards - away) / math.sqrt(told) if told else 0.0
    return Verdict(error if math.isfinite(error) else math.inf, leaning, tolerance)
