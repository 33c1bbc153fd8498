"""What the run offers to workers, and the check that a trajectory is what was offered. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from msgspec import structs

from palimpsest.common.messages import GroupOffered, Sampling, SegmentFlushed, TrajectoryFinished, group_id
from palimpsest.common.rejected_record import RejectCause
from palimpsest.common.trajectory import MalformedTrajectory
from palimpsest.services.learner.buffer.task_sampler import TaskCounter, task


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
    counter: TaskCounter | None = None
    """Counts the seeds of each environment; None draws them."""

    def task(self, index: int) -> tuple[str, int]:
        """Return environment and task seed of the group with this index."""
        environment, task_seed = task(self.seed, index, self.environments)
        return environment, task_seed if self.counter is None else self.counter.before(index, environment)


class OfferSettings:
    """The settings of the groups that a run offers. A change concerns the groups that are offered after it."""

    def __init__(self, settings: TaskSettings) -> None:
        self.next = settings
        """Of the next group."""
        self._temperatures: list[tuple[int, float]] = [(0, settings.sampling.temperature)]

    def use(self, later: Sequence[tuple[int, float]], *, time_limit_s: float) -> None:
        """Use other settings from now on.

        later: all changes of the temperature in the run, in their order: index of the first group, temperature.
        """
        self._temperatures = [self._temperatures[0], *later]
        sampling = structs.replace(self.next.sampling, temperature=self._temperatures[-1][1])
        self.next = replace(self.next, sampling=sampling, time_limit_s=time_limit_s)

    def temperature(self, index: int) -> float:
        """Return the temperature at which the group with this index was offered."""
        return next(temperature for first, temperature in reversed(self._temperatures) if first <= index)


def check_own(offer: GroupOffered, offers: OfferSettings) -> None:
    """Raise MalformedTrajectory if this run does not offer such a group.

    Temperature and time limit are not compared, because people can change them in a run.
    """
    if offer.index < 0 or offer.group != group_id(offer.index):
        _contradict("group", repr(offer.group[:32]), f"index {offer.index}")
    own = offers.next
    for name in ("max_turn_tokens", "max_trajectory_tokens", "max_turns"):
        if (found := getattr(offer.sampling, name)) != (wanted := getattr(own.sampling, name)):
            _contradict(name, found, f"{wanted} (sampling.{name})")
    if offer.samples != own.samples:
        _contradict("samples", offer.samples, f"{own.samples} (tasks.samples_per_group)")
    if (found := (offer.environment, offer.task_seed)) != (wanted := own.task(offer.index)):
        _contradict("task", found, wanted)


def check_offer(message: TrajectoryFinished | SegmentFlushed, offers: OfferSettings) -> None:
    """Raise MalformedTrajectory if the message contradicts the offer of its group.

    Log-probs at another temperature, or of another environment's task, would train the policy on something else. The
    group must be one of this run: its id gives its index.
    """
    sampling, index = offers.next.sampling, int(message.group[1:])
    if message.temperature != (temperature := offers.temperature(index)):
        _contradict("temperature", message.temperature, f"{temperature} (sampling.temperature)")
    tokens = len(message.tokens) // 4
    if tokens > sampling.max_trajectory_tokens:
        _contradict("tokens", tokens, f"at most {sampling.max_trajectory_tokens} (sampling.max_trajectory_tokens)")
    if isinstance(message, SegmentFlushed):
        return
    if message.turns > sampling.max_turns:
        _contradict("turns", message.turns, f"at most {sampling.max_turns} (sampling.max_turns)")
    environment, _ = task(offers.next.seed, index, offers.next.environments)
    if message.environment != environment:
        _contradict("environment", repr(message.environment), repr(environment))


def _contradict(what: str, found: object, offered: object) -> None:
    raise MalformedTrajectory(RejectCause.CONTRADICTS_OFFER, f"{what}: {found}, but the offer has {offered}")
