"""A deterministic run in virtual time: the real ledger and lognormal tool times, without engine and model.

The newest version samples the tokens of a trajectory at equal intervals over its duration. The unit of time is the
median duration.
"""

import heapq
import math
import random
from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from palimpsest.common.messages import trajectory_id
from palimpsest.common.versions import Version
from palimpsest.services.learner.buffer.admission import WAIT_SHARE
from palimpsest.services.learner.buffer.groups import ReadyGroup
from palimpsest.services.learner.buffer.ledger import TrajectoryLedger

NO_LIMIT_S = 1e9


@dataclass(frozen=True, slots=True)
class Load:
    """The simulated run."""

    max_staleness: int = 3
    groups_per_batch: int = 8
    samples: int = 2
    tokens: int = 32
    """Sampled tokens of a trajectory. The duration does not change them, because tools determine it."""
    sigma: float = 1.0
    """Standard deviation of the logarithm of a group's duration."""
    sibling_sigma: float = 0.0
    """Standard deviation of the logarithm of a trajectory's duration, relative to its group."""
    train: float = 0.05
    """Training time of a version."""
    capacity: int | None = None
    """Trajectories that the workers run at the same time; the others wait. None: no limit."""
    versions: int = 400
    warm_up: int = 40
    """Number of first versions that are not counted."""
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Rule:
    """How batches are chosen."""

    max_overtaking: int | None
    """See TrajectoryLedger."""
    whole: bool = False
    """Drop a trajectory if its oldest token is too old. False: if all its tokens are too old."""
    adaptive: bool = False
    """Admit fewer groups while the learner does not wait (learner.admission)."""


@dataclass(slots=True)
class Trajectory:
    """A simulated trajectory. Its tokens' versions are ascending."""

    group: str
    duration: float
    start: float = 0.0
    versions: list[int] = field(default_factory=list)
    complete_at: int = 0
    """The first version that could train on its group."""
    trained_at: int | None = None

    def inside(self, now: int, bound: int) -> int:
        """Number of tokens inside the staleness bound at version `now`."""
        return sum(version >= now - bound for version in self.versions)


@dataclass(frozen=True, slots=True)
class Outcome:
    """A finished simulation."""

    load: Load
    resolved: list[Trajectory]
    time: float
    """Duration of the counted versions, in median durations."""
    staleness: float
    """Mean over trained tokens, in versions."""


class Simulation:
    """One run."""

    def __init__(self, load: Load, rule: Rule) -> None:
        self._load, self._rule = load, rule
        self._random = random.Random(load.seed)  # noqa: S311
        self._ledger: TrajectoryLedger[Trajectory] = TrajectoryLedger(
            samples=load.samples,
            groups_per_batch=load.groups_per_batch,
            max_staleness=load.max_staleness,
            time_limit_s=NO_LIMIT_S,
            max_overtaking=rule.max_overtaking,
        )
        self._published: list[float] = []
        """Time at which version i + 1 was published."""
        self._in_flight: list[tuple[float, str, Trajectory]] = []
        self._groups: dict[str, list[Trajectory]] = {}
        """Arrived trajectories of incomplete groups."""
        self._queue: deque[tuple[str, Trajectory]] = deque()
        """Offered trajectories that have not started."""
        self._clock = 0.0

    def run(self) -> Outcome:
        """Train all versions. Returns the outcome."""
        resolved: list[Trajectory] = []
        begin, ages, trained, waited = 0.0, 0, 0, 0.0
        load = self._load
        while len(self._published) < load.versions + load.warm_up:
            self._admit()
            now = Version(len(self._published))
            dropped = self._ledger.drop_stale(now)
            batch = self._ledger.take_batch(now)
            counts = now >= load.warm_up
            if counts:
                resolved += dropped
            if batch is None:
                if not dropped:
                    before = self._clock
                    self._advance(self._in_flight[0][0], next_batch=now)
                    waited += self._clock - before
                continue
            if self._rule.adaptive:
                self._ledger.adapt(waited=waited > WAIT_SHARE * (waited + load.train))
            waited = 0.0
            if now == load.warm_up:
                begin = self._clock
            for trajectory in self._train(batch, now):
                if counts:
                    resolved.append(trajectory)
                    if trajectory.trained_at is not None:
                        fresh = [now - v for v in trajectory.versions if v >= now - load.max_staleness]
                        ages, trained = ages + sum(fresh), trained + len(fresh)
        return Outcome(load, resolved, self._clock - begin, ages / max(trained, 1))

    def _train(self, batch: list[ReadyGroup[Trajectory]], now: Version) -> list[Trajectory]:
        for ready in batch:
            for trajectory in ready.items:
                trajectory.trained_at = now
        self._advance(self._clock + self._load.train, next_batch=now + 1)
        self._published.append(self._clock)
        return [one for ready in batch for one in (*ready.items, *ready.stale)]

    def _admit(self) -> None:
        for _ in range(self._ledger.free_slots()):
            group = self._ledger.offer(now=0.0)
            shared = self._random.gauss(0.0, self._load.sigma)
            self._groups[group] = []
            for sample in range(self._load.samples):
                own = self._random.gauss(0.0, self._load.sibling_sigma)
                self._queue.append((trajectory_id(group, sample), Trajectory(group, math.exp(shared + own))))
        self._start()

    def _start(self) -> None:
        while self._queue and (self._load.capacity is None or len(self._in_flight) < self._load.capacity):
            name, trajectory = self._queue.popleft()
            trajectory.start = self._clock
            heapq.heappush(self._in_flight, (self._clock + trajectory.duration, name, trajectory))

    def _advance(self, until: float, *, next_batch: int) -> None:
        """Advance the clock to `until`; the trajectories that finish by then arrive. next_batch: the first version that
        can train on them."""
        while self._in_flight and self._in_flight[0][0] <= until:
            self._clock, name, one = heapq.heappop(self._in_flight)
            tokens = self._load.tokens
            for i in range(tokens):
                one.versions.append(bisect_right(self._published, one.start + one.duration * (i + 1) / tokens))
            key = one.versions[0 if self._rule.whole else -1]
            self._ledger.arrive(one.group, name, one, newest=Version(key))
            arrived = self._groups[one.group]
            arrived.append(one)
            if len(arrived) == self._load.samples:
                for sibling in self._groups.pop(one.group):
                    sibling.complete_at = next_batch
            self._start()
        self._clock = until


def simulate(load: Load, rule: Rule) -> Outcome:
    """Run the simulation."""
    return Simulation(load, rule).run()


def figures(outcome: Outcome) -> dict[str, float]:
    """Return the figures of a simulation, over the trajectories that resolved in the counted versions.

    The slowest tenth is by duration. A token is inside the bound if the first version that could train on its group
    could train on it; it is lost if it was not trained on.
    """
    by_duration = sorted(outcome.resolved, key=lambda one: one.duration)
    slowest = by_duration[-(len(by_duration) // 10) :]
    bound = outcome.load.max_staleness
    trained = sum(_trained(one, bound) for one in by_duration)
    return {
        "versions_per_median_duration": round(outcome.load.versions / outcome.time, 3),
        "trained_tokens_per_median_duration": round(trained / outcome.time, 1),
        "lost_token_share": _lost_share(by_duration, bound),
        "lost_token_share_slowest_tenth": _lost_share(slowest, bound),
        "dropped_share": dropped_share(by_duration),
        "dropped_share_slowest_tenth": dropped_share(slowest),
        "trained_token_share": _trained_share(by_duration, bound),
        "trained_token_share_slowest_tenth": _trained_share(slowest, bound),
        "staleness_mean": round(outcome.staleness, 3),
    }


def dropped_share(trajectories: Sequence[Trajectory]) -> float:
    """Share of trajectories without a trained token."""
    return round(sum(one.trained_at is None for one in trajectories) / len(trajectories), 4) if trajectories else 0.0


def _trained(one: Trajectory, bound: int) -> int:
    return 0 if one.trained_at is None else one.inside(one.trained_at, bound)


def _lost_share(trajectories: Sequence[Trajectory], bound: int) -> float:
    inside = sum(one.inside(one.complete_at, bound) for one in trajectories)
    trained = sum(_trained(one, bound) for one in trajectories)
    return round(1 - trained / inside, 4)


def _trained_share(trajectories: Sequence[Trajectory], bound: int) -> float:
    tokens = sum(len(one.versions) for one in trajectories)
    return round(sum(_trained(one, bound) for one in trajectories) / tokens, 4)
