"""The interface of a log, as the services use it.

Guarantees of every adapter: the records of a partition keep their order and get consecutive offsets. A key always maps
to the same partition. `publish` returns when the records are durable, so that records of a later call follow them.
Reading never skips a record: an offset that is gone raises OffsetGone. Delivery to a group is at least once. Kafka also
gives offsets to what is no record (the end of a transaction), so a topic to which other programs write may have gaps.

After an outage, a record may be on the log twice, and a later record of one `publish` call may precede an earlier one
of the same key. Readers deduplicate by id and do not depend on this order.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol, Self

PARTITIONS_STAY = (
    "The number of partitions cannot change during a run: restore bus.task_partitions and bus.trajectory_partitions, "
    "or start a new run"
)
"""Remedy for a topic that exists with another number of partitions."""


UNREADABLE = "unreadable"
"""Header of a record without a body that a consumer returns in place of bytes that are no records: the reason."""


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A record to publish."""

    key: str
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Position:
    """Position of a record on the log."""

    partition: int
    offset: int


@dataclass(frozen=True, slots=True)
class Record:
    """A record read from the log."""

    topic: str
    partition: int
    offset: int
    key: str
    body: bytes
    headers: Mapping[str, str]


class OffsetGone(LookupError):
    """Raised if the log does not hold the requested offset."""


class Consumer(Protocol):
    """Reads one topic: all partitions, or a share of them as a member of a group."""

    def poll(self, *, limit: int, timeout_s: float) -> list[Record]:
        """Return the next records, at most `limit`, or [] after `timeout_s` seconds. Raises OffsetGone."""

    def assignment(self) -> frozenset[int]:
        """Return the assigned partitions. They change only inside `poll`."""

    def seek(self, offsets: Mapping[int, int]) -> None:
        """Continue from these offsets (partition -> offset of the next record). Raises OffsetGone."""

    def commit(self, offsets: Mapping[int, int]) -> None:
        """Store the offsets at which the group restarts. Partitions that are not assigned are ignored."""

    def ends(self) -> dict[int, int]:
        """Return the offset after the last record of every partition of the topic."""

    def positions(self) -> dict[int, int]:
        """Return the offset of the next record of every assigned partition.

        It is the end of the partition once everything was returned, also if the last offsets hold no record.
        """

    def lag(self) -> int:
        """Return the number of records of the assigned partitions that are on the log and not returned yet.

        Kafka: as of the last fetch; a partition that was not fetched yet does not count.
        """

    def close(self) -> None:
        """Leave the group. Its partitions go to the other members."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Bus(Protocol):
    """A log of named topics."""

    def create_topics(self, partitions: Mapping[str, int]) -> None:
        """Create missing topics. Raises ValueError if a topic exists with another number of partitions."""

    def publish(self, topic: str, records: Sequence[Outgoing]) -> list[Position]:
        """Append the records durably, in order except after an outage. Returns their positions."""

    def consumer(self, topic: str, *, group: str | None = None, member: str = "") -> Consumer:
        """Return a consumer. Without a group it reads all partitions from the start and commits nothing."""

    def close(self) -> None:
        """Close the log. Consumers are closed separately."""


def partition_of(key: str, partitions: int) -> int:
    """Return the partition of a key. It is the same in every process and release.

    >>> partition_of("g000007", 4)
    3
    """
    return zlib.crc32(key.encode()) % partitions
