"""What a side reports of each step, and the figures of a side. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

SUCCESS, NEWEST = 0.8, 1000
"""A side has succeeded when the mean of this many newest rewards reaches this value."""


@dataclass(frozen=True, slots=True)
class Step:
    """One optimizer step, with its batch."""

    at: float
    """Unix time of its end, seconds."""
    tokens: int
    """Trained tokens: those that the model sampled."""
    rewards: int
    """Number of rewards."""
    reward: float
    """Their mean."""


@dataclass(frozen=True, slots=True)
class Side:
    """The figures of one run."""

    steps: int
    seconds: float
    """From the end of the first step to that of the last."""
    cpu_seconds_per_step: float
    trained_tokens_per_s: float
    seconds_to_success: float | None
    """From the end of the first step; None: never."""
    last_reward: float
    """Mean of the newest rewards at the end."""


def newest_mean(steps: Sequence[Step]) -> float | None:
    """Return the mean of the newest rewards; None before there are NEWEST of them.

    >>> newest_mean([Step(0, 1, 500, 0.0), Step(1, 1, 600, 1.0)])
    0.6
    """
    left, total = NEWEST, 0.0
    for step in reversed(steps):
        taken = min(left, step.rewards)
        total, left = total + taken * step.reward, left - taken
        if not left:
            return total / NEWEST
    return None


def side(steps: Sequence[Step], cpu: Sequence[tuple[float, float]]) -> Side:
    """Return the figures of a run. cpu: (Unix time, processor seconds of all its processes so far), ascending.

    The first step begins the count, so that the start of both sides is left out. Raises ValueError below two steps.
    """
    if len(steps) < 2:
        raise ValueError(f"{len(steps)} steps: the figures need at least two")
    began, ended = steps[0].at, steps[-1].at
    reached = None
    for end in range(1, len(steps) + 1):
        mean = newest_mean(steps[:end])
        if mean is not None and mean >= SUCCESS:
            reached = steps[end - 1].at - began
            break
    last = newest_mean(steps)
    rewards = sum(step.rewards for step in steps)
    return Side(
        steps=len(steps),
        seconds=round(ended - began, 2),
        cpu_seconds_per_step=round((_at(cpu, ended) - _at(cpu, began)) / (len(steps) - 1), 4),
        trained_tokens_per_s=round(sum(step.tokens for step in steps[1:]) / (ended - began), 1),
        seconds_to_success=None if reached is None else round(reached, 2),
        last_reward=round(sum(s.rewards * s.reward for s in steps) / rewards if last is None else last, 4),
    )


def ratios(ours: Side, peer: Side) -> dict[str, float]:
    """Return our figures divided by the peer's. A side that never succeeds counts with its whole time."""
    return {
        "cpu_seconds_per_step_ratio": round(ours.cpu_seconds_per_step / peer.cpu_seconds_per_step, 3),
        "trained_tokens_per_s_ratio": round(ours.trained_tokens_per_s / peer.trained_tokens_per_s, 3),
        "seconds_to_success_ratio": round(_success(ours) / _success(peer), 3),
    }


def _success(side: Side) -> float:
    return side.seconds if side.seconds_to_success is None else side.seconds_to_success


def _at(cpu: Sequence[tuple[float, float]], moment: float) -> float:
    """Interpolate the processor seconds at a moment."""
    before = [each for each in cpu if each[0] <= moment] or [cpu[0]]
    after = [each for each in cpu if each[0] > moment] or [cpu[-1]]
    (t0, c0), (t1, c1) = before[-1], after[0]
    return c0 if t1 <= t0 else c0 + (c1 - c0) * (min(max(moment, t0), t1) - t0) / (t1 - t0)
