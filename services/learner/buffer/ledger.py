"""The ledger of trajectories: the state of each offered trajectory, and the next batch. Pure.

Invariant:  offered = trained + dropped + dead-lettered + pending, and no id in two of them.

With B groups for each version, at most (max_staleness + 1) * B groups are unresolved. A batch has the B oldest complete
groups, so a complete group is trained on at most max_staleness versions later, and its newest token is inside the bound
(docs/algorithms/admission.md has the proof). With `max_overtaking`, a batch also waits for an incomplete group that so
many younger groups have overtaken. A trajectory is dropped as too stale only if none of its tokens is inside the bound
when its group is trained on. Its reward still counts in the baseline of its siblings.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Generic

from msgspec import Struct

from palimpsest.common.branches import trajectory_of
from palimpsest.common.messages import DropReason, group_id, trajectory_id
from palimpsest.common.staleness_bound import StalenessBound
from palimpsest.common.versions import Version
from palimpsest.services.learner.buffer.admission import AdmissionLimit
from palimpsest.services.learner.buffer.groups import Finished, Group, ReadyGroup, T, parse_id

DEAD_LETTERED = "dead_lettered"
TRAINED = "trained"


class ArrivalStatus(StrEnum):
    """Effect of a trajectory's record on the ledger."""

    NEW = "new"
    RECOVERED = "recovered"
    """The trajectory had ended as a dead letter and its group is still open: the record is used like a new one."""
    DUPLICATE = "duplicate"
    """The trajectory has arrived or ended already."""
    UNKNOWN = "unknown"
    """The trajectory was never offered in this run."""


class LedgerState(Struct, frozen=True, forbid_unknown_fields=True):
    """A ledger in a checkpoint, without the arrived trajectories: a restart reads them from the log again."""

    next_index: int
    open_groups: dict[str, dict[int, str]]
    """Group with pending trajectories -> sample -> its end."""
    trained: int
    dropped: dict[str, int]
    dead_lettered: int
    offered: int


class TrajectoryLedger(Generic[T]):
    """Holds arrived trajectories (of any type T) until they are trained on.

    >>> ledger = TrajectoryLedger(samples=2, groups_per_batch=1, max_staleness=1, time_limit_s=60)
    >>> [ledger.offer(now=0.0) for _ in range(ledger.free_slots())]
    ['g000000', 'g000001']
    >>> ledger.free_slots()
    0
    >>> ledger.arrive("g000000", "g000000/0", "first"), ledger.arrive("g000000", "g000000/1", "second")
    (<ArrivalStatus.NEW: 'new'>, <ArrivalStatus.NEW: 'new'>)
    >>> [ready.items for ready in ledger.take_batch(Version(0)) or []]
    [['first', 'second']]
    >>> ledger.counts()
    {'offered': 4, 'trained': 2, 'dropped': {}, 'dead_lettered': 0, 'pending': 2}
    >>> ledger.free_slots()
    1
    """

    def __init__(
        self,
        *,
        samples: int,
        groups_per_batch: int,
        max_staleness: int,
        time_limit_s: float,
        max_overtaking: int | None = None,
    ) -> None:
        """max_overtaking: younger groups that may resolve before a group until the batch waits for it. None: any
        number."""
        self._samples, self._batch = samples, groups_per_batch
        self.bound, self._time_limit_s = StalenessBound(max_staleness), time_limit_s
        self._max_overtaking = max_overtaking
        self._limit = AdmissionLimit(groups_per_batch=groups_per_batch, highest=self._most_groups())
        self._open: dict[str, Group[T]] = {}
        self._next_index = 0
        self._offered = self._trained = self._dead_lettered = 0
        self._dropped: dict[str, int] = {}

    @property
    def next_index(self) -> int:
        """Index of the next group to offer."""
        return self._next_index

    def free_slots(self) -> int:
        """Groups that may be offered now: (max_staleness + 1) * groups_per_batch - unresolved, or fewer (`adapt`)."""
        return max(0, self._limit.groups - len(self._open))

    def use_bound(self, bound: StalenessBound) -> None:
        """Use this staleness bound from now on. A lower one admits no group until enough groups are resolved."""
        self.bound = bound
        self._limit.resize(self._most_groups())

    def adapt(self, *, waited: bool) -> None:
        """Adapt the number of unresolved groups after a batch was taken. waited: whether the learner waited for it."""
        self._limit.observe(surplus=self.complete(), waited=waited)

    @property
    def admitted_groups(self) -> int:
        """Number of groups that may be unresolved."""
        return self._limit.groups

    def offer(self, *, now: float, samples: int | None = None, time_limit_s: float | None = None) -> str:
        """Enter the next group. Return its id. now: seconds, of the clock that `expire` uses."""
        group = group_id(self._next_index)
        self._open[group] = Group(self._next_index, samples or self._samples, now, time_limit_s or self._time_limit_s)
        self._offered += samples or self._samples
        self._next_index += 1
        return group

    def status_of(self, group: str, trajectory: str) -> ArrivalStatus:
        """Return the status that a record of this trajectory, or of a branch, would have now. Changes nothing."""
        return self._find(group, trajectory_of(trajectory)).status

    def arrive(self, group: str, trajectory: str, item: T, *, newest: Version | None = None) -> ArrivalStatus:
        """Enter a finished trajectory. newest: version of its newest token; None if no token was sampled."""
        entry = self._find(group, trajectory)
        if entry.group is not None:
            self._recover(entry.group, entry.sample, entry.status)
            entry.group.arrived[entry.sample] = Finished(item, newest)
        return entry.status

    def drop(self, group: str, trajectory: str, reason: DropReason) -> ArrivalStatus:
        """Enter a dropped trajectory."""
        entry = self._find(group, trajectory)
        if entry.group is not None:
            self._recover(entry.group, entry.sample, entry.status)
            self._end(entry.group, entry.sample, reason.value)
        return entry.status

    def dead_letter(self, group: str, trajectory: str) -> ArrivalStatus:
        """Enter a trajectory whose record cannot be used."""
        entry = self._find(group, trajectory)
        if entry.status is ArrivalStatus.RECOVERED:
            return ArrivalStatus.DUPLICATE  # it is a dead letter already
        if entry.group is not None:
            self._end(entry.group, entry.sample, DEAD_LETTERED)
        return entry.status

    def expire(self, *, now: float) -> list[str]:
        """Drop the trajectories that have been awaited for longer than the time limit. Return their ids."""
        late: list[str] = []
        for name, group in list(self._open.items()):
            if now - group.offered_at > group.time_limit_s:
                for sample in group.awaited:
                    self._end(group, sample, DropReason.DEADLINE.value)
                    late.append(trajectory_id(name, sample))
        return late

    def drop_stale(self, now: Version) -> list[T]:
        """Drop the arrived trajectories of complete groups in which no token is inside the bound. Return the items."""
        lowest, dropped = self.bound.lowest(now), list[T]()
        for group in list(self._open.values()):
            if not group.awaited and not (ready := group.ready(lowest)).items:
                dropped += ready.stale
                self._end_arrived(group, lowest)
        return dropped

    def complete(self) -> int:
        """Number of groups in which no trajectory is awaited."""
        return sum(not group.awaited for group in self._open.values())

    def drop_small(self) -> list[T]:
        """Drop the arrived trajectories of complete groups that are too small for a baseline. Return the items."""
        dropped: list[T] = []
        for group in list(self._open.values()):
            if not group.awaited and len(group.arrived) < 2:
                dropped += self._drop_arrived(group, DropReason.GROUP_TOO_SMALL)
        return dropped

    def drop_even(self, reward: Callable[[T], float]) -> list[list[T]]:
        """Drop the arrived trajectories of complete groups whose rewards are all equal. Return the items of each
        group."""
        return [
            self._drop_arrived(group, DropReason.EVEN_GROUP)
            for group in list(self._open.values())
            if not group.awaited and len({reward(arrived.item) for arrived in group.arrived.values()}) == 1
        ]

    def peek_batch(self, now: Version) -> list[ReadyGroup[T]] | None:
        """Return the oldest complete groups, enough for a batch; None if the batch must wait. Changes nothing.

        now: the version to train at. The batch waits for more complete groups, or for a group that younger groups may
        not overtake.
        """
        ready = [group for group in self._open.values() if not group.awaited][: self._batch]
        if len(ready) < self._batch or self._waits_for_older(ready):
            return None
        return [group.ready(self.bound.lowest(now)) for group in ready]

    def next_groups(self) -> frozenset[str]:
        """Return the oldest complete groups, at most a batch: the next batch takes them unless older ones complete."""
        ready = [name for name, group in self._open.items() if not group.awaited]
        return frozenset(ready[: self._batch])

    def take_batch(self, now: Version) -> list[ReadyGroup[T]] | None:
        """Return the groups of `peek_batch`. Count `items` as trained, and `stale` as dropped."""
        batch = self.peek_batch(now)
        for ready in batch or []:
            self._end_arrived(self._open[ready.group], self.bound.lowest(now))
        return batch

    def bury(self) -> None:
        """Count one trajectory of the last batch as a dead letter, not as trained: the training failed on it."""
        self._trained -= 1
        self._dead_lettered += 1

    def overtaken(self, group: str) -> int:
        """Number of younger groups that resolved before this open group."""
        index = self._open[group].index
        return self._next_index - 1 - index - sum(other.index > index for other in self._open.values())

    def counts(self) -> dict[str, int | dict[str, int]]:
        """Numbers of trajectories by state."""
        return {
            "offered": self._offered,
            "trained": self._trained,
            "dropped": dict(self._dropped),
            "dead_lettered": self._dead_lettered,
            "pending": self.pending(),
        }

    def is_open(self, group: str) -> bool:
        """Whether a trajectory of the group is pending."""
        return group in self._open

    def is_pending(self, trajectory: str) -> bool:
        """Whether the trajectory, or that of a branch, is awaited or waits to be trained on."""
        name, sample = parse_id(trajectory_of(trajectory))
        group = self._open.get(name)
        return group is not None and 0 <= sample < group.samples and sample not in group.ended

    def pending(self) -> int:
        """Return the number of trajectories that have not ended."""
        return sum(group.pending for group in self._open.values())

    def oldest_live_age(self, *, now: float) -> float | None:
        """Return the seconds since the offer of the oldest trajectory that has not ended; None without any."""
        return max((now - group.offered_at for group in self._open.values() if group.pending), default=None)

    def age(self, group: str, *, now: float) -> float:
        """Return the seconds since the offer of an open group; 0 for another group."""
        return now - self._open[group].offered_at if group in self._open else 0.0

    def oldest_open(self) -> str | None:
        """Id of the oldest open group; None if no group is open."""
        return next(iter(self._open), None)

    def waiting(self) -> int:
        """Number of trajectories that have arrived and are not trained on yet."""
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
        """Continue from a checkpoint. The time limits of open groups start again."""
        self._next_index = state.next_index
        self._open = {
            name: Group(int(name[1:]), self._samples, now, self._time_limit_s, ended=dict(ended))
            for name, ended in state.open_groups.items()
        }
        self._trained, self._dropped = state.trained, dict(state.dropped)
        self._dead_lettered, self._offered = state.dead_lettered, state.offered

    def _most_groups(self) -> int:
        return (self.bound.number + 1) * self._batch

    def _find(self, group: str, trajectory: str) -> "_Entry[T]":
        name, sample = parse_id(trajectory)
        if name != group or sample < 0:
            return _Entry(ArrivalStatus.UNKNOWN)
        if (entry := self._open.get(name)) is None:
            closed = int(name[1:]) < self._next_index and sample < self._samples
            return _Entry(ArrivalStatus.DUPLICATE if closed else ArrivalStatus.UNKNOWN)
        if sample >= entry.samples:
            return _Entry(ArrivalStatus.UNKNOWN)
        if entry.ended.get(sample) == DEAD_LETTERED:
            return _Entry(ArrivalStatus.RECOVERED, entry, sample)
        if sample in entry.arrived or sample in entry.ended:
            return _Entry(ArrivalStatus.DUPLICATE)
        return _Entry(ArrivalStatus.NEW, entry, sample)

    def _waits_for_older(self, batch: list[Group[T]]) -> bool:
        """Whether the batch would overtake the oldest incomplete group too often. Younger groups are overtaken less."""
        oldest = next((group for group in self._open.values() if group.awaited), None)
        if oldest is None or self._max_overtaking is None:
            return False
        younger = sum(group.index > oldest.index for group in batch)
        return younger > 0 and self.overtaken(group_id(oldest.index)) + younger > self._max_overtaking

    def _drop_arrived(self, group: Group[T], reason: DropReason) -> list[T]:
        """Drop all arrived trajectories of the group. Return their items."""
        items = [arrived.item for arrived in group.arrived.values()]
        for sample in list(group.arrived):
            del group.arrived[sample]
            self._end(group, sample, reason.value)
        return items

    def _end_arrived(self, group: Group[T], lowest: int) -> None:
        """End the arrived trajectories: dropped where all tokens are older than `lowest`, else trained."""
        for sample, arrived in list(group.arrived.items()):
            del group.arrived[sample]
            self._end(group, sample, DropReason.OVER_STALENESS.value if arrived.is_stale(lowest) else TRAINED)

    def _recover(self, group: Group[T], sample: int, status: ArrivalStatus) -> None:
        """If the trajectory ended as a dead letter, undo that."""
        if status is ArrivalStatus.RECOVERED:
            del group.ended[sample]
            self._dead_lettered -= 1

    def _end(self, group: Group[T], sample: int, end: str) -> None:
        group.ended[sample] = end
        if end == TRAINED:
            self._trained += 1
        elif end == DEAD_LETTERED:
            self._dead_lettered += 1
        else:
            self._dropped[end] = self._dropped.get(end, 0) + 1
        if not group.pending:
            del self._open[group_id(group.index)]


@dataclass(frozen=True, slots=True)
class _Entry(Generic[T]):
    """The ledger's entry for a trajectory. `group` is set if a record of the trajectory would be used."""

    status: ArrivalStatus
    group: Group[T] | None = None
    sample: int = -1
