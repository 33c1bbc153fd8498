"""A bus in the memory of one process, for tests, with the semantics of the real adapters.

`Store.clock` and `Store.wait` provide time and waiting, so tests can simulate both.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from palimpsest.common.bus.port import PARTITIONS_STAY, OffsetGone, Outgoing, Position, Record, partition_of

LEASE_S = 10.0


@dataclass
class _Partition:
    first: int = 0
    records: list[Record] = field(default_factory=list)
    """Records from offset `first`."""

    @property
    def end(self) -> int:
        return self.first + len(self.records)


@dataclass
class Store:
    """State that buses and consumers share."""

    clock: Callable[[], float] = time.monotonic
    topics: dict[str, list[_Partition]] = field(default_factory=dict)
    commits: dict[tuple[str, str], dict[int, int]] = field(default_factory=dict)
    members: dict[tuple[str, str], dict[str, float]] = field(default_factory=dict)
    """By topic and group: member -> time of its last poll."""
    change: threading.Condition = field(default_factory=threading.Condition)

    def wait(self, topic: str, timeout_s: float) -> None:
        """Wait until a publication on the topic or for timeout_s. The caller holds the lock; waiting releases it."""
        self.change.wait(timeout_s)

    def published(self, topic: str, records: Sequence[Record]) -> None:
        """Called after records were added, with the lock held: wake the waiting consumers."""
        self.change.notify_all()

    def on_access(self) -> None:
        """Called before every access but a poll. Simulations of outages wait here."""

    def available(self, limit: int, timeout_s: float) -> int:
        """Number of records that a poll with this limit and timeout may return; simulations return fewer."""
        return limit

    def partitions(self, topic: str) -> list[_Partition]:
        """Partitions of the topic. Raises LookupError if it does not exist."""
        if topic not in self.topics:
            raise LookupError(f"topic {topic} does not exist; the start of a run creates it")
        return self.topics[topic]

    def cut(self, topic: str, partition: int, before: int) -> None:
        """Delete the records below this offset, as retention does."""
        with self.change:
            standing = self.topics[topic][partition]
            del standing.records[: before - standing.first]
            standing.first = before


class MemoryBus:
    """See common/bus/port.py. Safe to share between threads; several may be open on one store."""

    def __init__(self, store: Store, *, lease_s: float = LEASE_S) -> None:
        self.store, self._lease_s = store, lease_s

    def create_topics(self, partitions: Mapping[str, int]) -> None:
        with self.store.change:
            for topic, count in partitions.items():
                standing = len(self.store.topics.get(topic, ())) or count
                if standing != count:
                    raise ValueError(
                        f"topic {topic} in memory has {standing} partitions; the run needs {count}\n{PARTITIONS_STAY}"
                    )
            for topic, count in partitions.items():
                self.store.topics.setdefault(topic, [_Partition() for _ in range(count)])

    def publish(self, topic: str, records: Sequence[Outgoing]) -> list[Position]:
        if not records:
            return []
        self.store.on_access()
        standing: list[Record] = []
        with self.store.change:
            partitions = self.store.partitions(topic)
            for record in records:
                number = partition_of(record.key, len(partitions))
                partition = partitions[number]
                standing.append(Record(topic, number, partition.end, record.key, record.body, dict(record.headers)))
                partition.records.append(standing[-1])
            self.store.published(topic, standing)
        return [Position(record.partition, record.offset) for record in standing]

    def consumer(self, topic: str, *, group: str | None = None, member: str = "") -> "MemoryConsumer":
        return MemoryConsumer(self.store, topic, group, member, lease_s=self._lease_s)

    def close(self) -> None: ...


class MemoryConsumer:
    """See common/bus/port.py. Belongs to one thread at a time."""

    def __init__(self, store: Store, topic: str, group: str | None, member: str, *, lease_s: float) -> None:
        if group is not None and not member:
            raise ValueError(f"a consumer of group {group} needs a member name")
        self._store, self._topic, self._group, self._member = store, topic, group, member
        self._lease_s = lease_s
        self._next: dict[int, int] = {}
        self._turn = 0
        self._until: float | None = None
        if group is None:
            self._next = {number: partition.first for number, partition in enumerate(store.partitions(topic))}

    def poll(self, *, limit: int, timeout_s: float) -> list[Record]:
        if self._until is None:  # else the same poll continues: a simulated wait may have left it by raising
            self._until = self._store.clock() + timeout_s
        with self._store.change:
            while True:
                self._renew_membership()
                records = self._read(self._store.available(limit, timeout_s))
                left = self._until - self._store.clock()
                if records or left <= 0:
                    self._until = None
                    return records
                self._store.wait(self._topic, left if self._group is None else min(left, self._lease_s / 3))

    def assignment(self) -> frozenset[int]:
        return frozenset(self._next)

    def seek(self, offsets: Mapping[int, int]) -> None:
        self._store.on_access()
        partitions = self._store.partitions(self._topic)
        for number, offset in offsets.items():
            if not 0 <= number < len(partitions):
                raise OffsetGone(f"{self._topic} has no partition {number}: the log belongs to another run")
            first, end = partitions[number].first, partitions[number].end
            if not first <= offset <= end:
                raise OffsetGone(f"{self._topic}[{number}] holds offsets {first} to {end}, not {offset}")
        self._next.update(offsets)

    def commit(self, offsets: Mapping[int, int]) -> None:
        if self._group is None:
            raise ValueError(f"a consumer of {self._topic} without a group has nothing to commit to")
        self._store.on_access()
        with self._store.change:
            mine = self._share()
            commits = self._store.commits.setdefault((self._topic, self._group), {})
            commits.update({partition: offset for partition, offset in offsets.items() if partition in mine})

    def ends(self) -> dict[int, int]:
        self._store.on_access()
        return {number: partition.end for number, partition in enumerate(self._store.partitions(self._topic))}

    def positions(self) -> dict[int, int]:
        return dict(self._next)

    def lag(self) -> int:
        partitions = self._store.partitions(self._topic)
        return sum(partitions[number].end - offset for number, offset in self._next.items())

    def close(self) -> None:
        if self._group is not None:
            with self._store.change:
                self._members().pop(self._member, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read(self, limit: int) -> list[Record]:
        records: list[Record] = []
        numbers = sorted(self._next)
        self._turn += 1  # each poll begins with another partition, so none starves
        for i in range(len(numbers)):
            number = numbers[(self._turn + i) % len(numbers)]
            partition, following = self._store.partitions(self._topic)[number], self._next[number]
            if following < partition.first:
                raise OffsetGone(
                    f"{self._topic}[{number}]: offset {following} is gone, the log starts at {partition.first}"
                )
            begin = following - partition.first
            records += partition.records[begin : begin + limit - len(records)]
            self._next[number] = max(following, *(r.offset + 1 for r in records if r.partition == number), 0)
        return records

    def _renew_membership(self) -> None:
        if self._group is None:
            return
        partitions = self._store.partitions(self._topic)
        now = self._store.clock()
        if now - self._members().get(self._member, now) > self._lease_s:
            self._next = {}  # another member may have had the partitions meanwhile
        self._members()[self._member] = now
        share = self._share()
        if share == set(self._next):
            return
        commits = self._store.commits.get((self._topic, self._group), {})
        self._next = {p: self._next.get(p, commits.get(p, partitions[p].first)) for p in share}

    def _members(self) -> dict[str, float]:
        assert self._group is not None
        return self._store.members.setdefault((self._topic, self._group), {})

    def _share(self) -> set[int]:
        now = self._store.clock()
        members = sorted(name for name, heard in self._members().items() if now - heard <= self._lease_s)
        if self._member not in members:
            return set()
        place = members.index(self._member)
        return {p for p in range(len(self._store.partitions(self._topic))) if p % len(members) == place}
