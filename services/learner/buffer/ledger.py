"""The ledger of trajectories: what was offered, what became of it, what may be trained on next. Pure.

Invariant, at every moment:  offered = trained + dropped + dead-lettered + pending, and no id in two of them.

Admission keeps staleness inside its bound before sampling (docs/paper.md, "staleness bound"): with B groups for each
version, at most (max_staleness + 1) * B groups are unresolved. Batches take the oldest complete groups first, so that
a group offered under version v is trained on at version v + max_staleness at the latest; only a group that others
overtook can be older, and what is too old by then is dropped and counted.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Generic, TypeVar

from msgspec import Struct

from palimpsest.common.messages import DropReason, group_id, trajectory_id
from palimpsest.common.versions import Version

T = TypeVar("T")

DEAD_LETTERED = "dead_lettered"
TRAINED = "trained"


class ArrivalStatus(StrEnum):
    """What the ledger makes of a trajectory that was heard of."""

    NEW = "new"
    REVIVED = "revived"
    """It had ended as a dead letter, and its group can still use it: now it is taken as if it were new."""
    DUPLICATE = "duplicate"
    """Its end is already known."""
    UNKNOWN = "unknown"
    """It was never offered in this run."""


class LedgerState(Struct, frozen=True, forbid_unknown_fields=True):
    """A ledger in a checkpoint. Arrived trajectories are not in it: they are read from the log again."""

    next_index: int
    open_groups: dict[str, dict[int, str]]
    """Group with pending trajectories -> sample -> how it ended."""
    trained: int
    dropped: dict[str, int]
    dead_lettered: int
    offered: int


@dataclass
class _Group(Generic[T]):
    index: int
    samples: int
    offered_at: float
    arrived: dict[int, T] = field(default_factory=dict)
    ended: dict[int, str] = field(default_factory=dict)

    @property
    def pending(self) -> int:
        return self.samples - len(self.ended)

    @property
    def awaited(self) -> list[int]:
        return [s for s in range(self.samples) if s not in self.arrived and s not in self.ended]


class TrajectoryLedger(Generic[T]):
    """Holds arrived trajectories (of any type T) until they are trained on.

    >>> planner = TrajectoryLedger(samples=2, groups_per_batch=1, max_staleness=1, time_limit_s=60)
    >>> [planner.offer(now=0.0) for _ in range(planner.slots())]
    ['g000000', 'g000001']
    >>> planner.slots()
    0
    >>> planner.arrive("g000000", "g000000/0", "first"), planner.arrive("g000000", "g000000/1", "second")
    (<Arrival.NEW: 'new'>, <Arrival.NEW: 'new'>)
    >>> [batch.items for batch in planner.batch() or []]
    [['first', 'second']]
    >>> planner.counts()
    {'offered': 4, 'trained': 2, 'dropped': {}, 'dead_lettered': 0, 'pending': 2}
    >>> planner.slots()
    1
    """

    def __init__(self, *, samples: int, groups_per_batch: int, max_staleness: int, time_limit_s: float) -> None:
        self._samples, self._batch = samples, groups_per_batch
        self._max_staleness, self._time_limit_s = max_staleness, time_limit_s
        self._open: dict[str, _Group[T]] = {}
        self._next_index = 0
        self._offered = self._trained = self._dead_lettered = 0
        self._dropped: dict[str, int] = {}

    @property
    def next_index(self) -> int:
        """Index of the next group to offer."""
        return self._next_index

    def free_slots(self) -> int:
        """Groups that may be offered now: (max_staleness + 1) * groups_per_batch - unresolved."""
        return max(0, (self._max_staleness + 1) * self._batch - len(self._open))

    def offer(self, *, now: float, samples: int | None = None) -> str:
        """Enter the next group; its id. `now`: any clock that `expire` is given too, seconds."""
        group = group_id(self._next_index)
        self._open[group] = _Group(self._next_index, samples or self._samples, now)
        self._offered += samples or self._samples
        self._next_index += 1
        return group

    def arrive(self, group: str, trajectory: str, item: T) -> ArrivalStatus:
        """A finished trajectory came back."""
        revived = self._revive(group, trajectory)
        if (known := self._known(group, trajectory)) is not ArrivalStatus.NEW:
            return known
        self._open[group].arrived[_sample(trajectory)] = item
        return ArrivalStatus.REVIVED if revived else ArrivalStatus.NEW

    def drop(self, group: str, trajectory: str, reason: DropReason) -> ArrivalStatus:
        """A trajectory was given up."""
        revived = self._revive(group, trajectory)
        known = self._end(group, trajectory, reason.value)
        return ArrivalStatus.REVIVED if revived and known is ArrivalStatus.NEW else known

    def dead_letter(self, group: str, trajectory: str) -> ArrivalStatus:
        """A trajectory's record cannot be used."""
        return self._end(group, trajectory, DEAD_LETTERED)

    def expire(self, *, now: float) -> list[str]:
        """Drop what has been awaited for too long; the ids."""
        late: list[str] = []
        for name, group in list(self._open.items()):
            if now - group.offered_at > self._time_limit_s:
                late += [trajectory_id(name, sample) for sample in group.awaited]
        for trajectory in late:
            self.drop(trajectory.rpartition("/")[0], trajectory, DropReason.DEADLINE)
        return late

    def drop_stale(self, now: Version, oldest: Mapping[str, Version]) -> list[T]:
        """Drop arrived trajectories whose oldest token is over the bound; the items."""
        stale = []
        for group in list(self._open.values()):
            for sample, item in list(group.arrived.items()):
                name = trajectory_id(group_id(group.index), sample)
                if now - oldest[name] > self._max_staleness:
                    stale.append(item)
                    del group.arrived[sample]
                    self._end(group_id(group.index), name, DropReason.OVER_STALENESS.value)
        return stale

    def complete(self) -> int:
        """Groups of which nothing is awaited any more."""
        return sum(not group.awaited for group in self._open.values())

    def drop_small(self) -> list[T]:
        """Drop what is left of complete groups too small for a baseline; the items."""
        dropped: list[T] = []
        for name, group in list(self._open.items()):
            if not group.awaited and len(group.arrived) < 2:
                for sample, item in list(group.arrived.items()):
                    dropped.append(item)
                    del group.arrived[sample]
                    self._end(name, trajectory_id(name, sample), DropReason.GROUP_TOO_SMALL.value)
        return dropped

    def peek_batch(self) -> "list[ReadyGroup[T]] | None":
        """The oldest complete groups, as many as a batch has; None while they are too few. Changes nothing."""
        ready = sorted((g for g in self._open.values() if not g.awaited), key=lambda g: g.index)[: self._batch]
        if len(ready) < self._batch:
            return None
        return [ReadyGroup(group_id(g.index), [g.arrived[sample] for sample in sorted(g.arrived)]) for g in ready]

    def take_batch(self) -> "list[ReadyGroup[T]] | None":
        """The groups that are ready, now counted as trained."""
        batch = self.peek_batch()
        for ready in batch or []:
            group = self._open[ready.group]
            for sample in list(group.arrived):
                del group.arrived[sample]
                self._end(ready.group, trajectory_id(ready.group, sample), TRAINED)
        return batch

    def counts(self) -> dict[str, int | dict[str, int]]:
        """The ledger's sums, in trajectories."""
        return {
            "offered": self._offered,
            "trained": self._trained,
            "dropped": dict(self._dropped),
            "dead_lettered": self._dead_lettered,
            "pending": sum(group.pending for group in self._open.values()),
        }

    def is_open(self, group: str) -> bool:
        """Whether some trajectory of the group is pending."""
        return group in self._open

    def is_pending(self, trajectory: str) -> bool:
        """Whether the trajectory's fate is open: it is awaited, or it waits to be trained on."""
        group, _, _ = trajectory.rpartition("/")
        standing, sample = self._open.get(group), _sample(trajectory)
        if standing is None or not 0 <= sample < standing.samples or trajectory != trajectory_id(group, sample):
            return False
        return sample not in standing.ended

    def oldest_open(self) -> str | None:
        """The group unresolved for longest."""
        return next(iter(self._open), None)

    def waiting(self) -> int:
        """Trajectories that arrived and are not yet trained on."""
        return sum(len(group.arrived) for group in self._open.values())

    def state(self) -> LedgerState:
        """For a checkpoint."""
        return LedgerState(
            next_index=self._next_index,
            open_groups={name: dict(group.ended) for name, group in self._open.items()},
            trained=self._trained,
            dropped=dict(self._dropped),
            dead_lettered=self._dead_lettered,
            offered=self._offered,
        )

    def restore(self, state: LedgerState, *, now: float) -> None:
        """Go on from a checkpoint; deadlines begin anew."""
        self._next_index = state.next_index
        self._open = {
            name: _Group(int(name[1:]), self._samples, now, ended=dict(ended))
            for name, ended in state.open_groups.items()
        }
        self._trained, self._dropped = state.trained, dict(state.dropped)
        self._dead_lettered, self._offered = state.dead_lettered, state.offered

    def _known(self, group: str, trajectory: str) -> ArrivalStatus:
        standing = self._open.get(group)
        sample = _sample(trajectory)
        if standing is None:
            offered = 0 <= sample < self._samples and self._was_offered(group)
            return (
                ArrivalStatus.DUPLICATE
                if offered and trajectory == trajectory_id(group, sample)
                else ArrivalStatus.UNKNOWN
            )
        if not 0 <= sample < standing.samples or trajectory != trajectory_id(group, sample):
            return ArrivalStatus.UNKNOWN
        return ArrivalStatus.DUPLICATE if sample in standing.arrived or sample in standing.ended else ArrivalStatus.NEW

    def _was_offered(self, group: str) -> bool:
        index = int(group[1:]) if group[1:].isdecimal() else -1
        return 0 <= index < self._next_index and group == group_id(index)

    def _revive(self, group: str, trajectory: str) -> bool:
        """Take back that a trajectory was lost to a dead letter, while its group is open; whether it was."""
        standing, sample = self._open.get(group), _sample(trajectory)
        if trajectory != trajectory_id(group, sample):
            return False
        if standing is None or standing.ended.get(sample) != DEAD_LETTERED:
            return False
        del standing.ended[sample]
        self._dead_lettered -= 1
        return True

    def _end(self, group: str, trajectory: str, how: str) -> ArrivalStatus:
        if (known := self._known(group, trajectory)) is not ArrivalStatus.NEW:
            return known
        standing = self._open[group]
        standing.ended[_sample(trajectory)] = how
        match how:
            case "trained":
                self._trained += 1
            case "dead_lettered":
                self._dead_lettered += 1
            case _:
                self._dropped[how] = self._dropped.get(how, 0) + 1
        if not standing.pending:
            del self._open[group]
        return ArrivalStatus.NEW


@dataclass(frozen=True, slots=True)
class ReadyGroup(Generic[T]):
    """A complete group's trajectories."""

    group: str
    items: list[T]


def _sample(trajectory: str) -> int:
    _, _, sample = trajectory.rpartition("/")
    return int(sample) if sample.isdecimal() else -1
