"""What the run offers to workers, and the check that a trajectory is what was offered. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass

from palimpsest.common.messages import Sampling, SegmentFlushed, TrajectoryFinished
from palimpsest.common.rejected_record import RejectCause
from palimpsest.common.trajectory import MalformedTrajectory
from palimpsest.services.learner.buffer.task_sampler import task


@dataclass(frozen=True, slots=True)
class TaskSettings:
    """Settings for the tasks of a run: where they are drawn from, and how workers sample them."""

    seed: int
    environments: Mapping[str, float]
    """Environment -> weight."""
    samples: int
    """Trajectories in a group."""
    sampling: Sampling
    time_limit_s: float

    def task(self, index: int) -> tuple[str, int]:
        """Return environment and task seed of the group with this index."""
        return task(self.seed, index, self.environments)


def check_offer(message: TrajectoryFinished | SegmentFlushed, offered: TaskSettings) -> None:
    """Raise MalformedTrajectory if the message contradicts the offer of its group.

    Log-probs at another temperature, or of another environment's task, would train the policy on something else. The
    group must be one of this run: its id gives its index.
    """
    sampling = offered.sampling
    if message.temperature != sampling.temperature:
        _contradict("temperature", message.temperature, f"{sampling.temperature} (sampling.temperature)")
    tokens = len(message.tokens) // 4
    if tokens > sampling.max_trajectory_tokens:
        _contradict("tokens", tokens, f"at most {sampling.max_trajectory_tokens} (sampling.max_trajectory_tokens)")
    if isinstance(message, SegmentFlushed):
        return
    if message.turns > sampling.max_turns:
        _contradict("turns", message.turns, f"at most {sampling.max_turns} (sampling.max_turns)")
    environment, _ = offered.task(int(message.group[1:]))
    if message.environment != environment:
        _contradict("environment", repr(message.environment), repr(environment))


def _contradict(what: str, found: object, offered: str) -> None:
    raise MalformedTrajectory(RejectCause.CONTRADICTS_OFFER, f"{what}: {found}, but the offer has {offered}")
