"""What the services need of a log.

Promises every adapter keeps: records of one partition keep their order and get consecutive offsets; a key always
lands in the same partition; `publish` returns when the records are durable, so that those of a later call stand behind
them; reading never skips: an offset that is gone raises OffsetGone. Delivery to a group is at least once.

What an outage may do: a record stands on the log twice; of the records of one call, a later one stands before an
earlier one of the same key. Readers know ids and rely on no more.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol, Self

PARTITIONS_STAY = (
    "Partitions cannot be changed under a run: set bus.task_partitions and bus.trajectory_partitions back, or use a "
    "new run"
)
"""What to do about a topic that stands there with other partitions."""


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A record to publish."""

    key: str
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Position:
    """Where a record stands on the log."""

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
    """The log no longer (or not yet) holds the offset a reader asked for."""


class Consumer(Protocol):
    """Reads one topic: all partitions, or a share of them as a member of a group."""

    def poll(self, *, limit: int, timeout_s: float) -> list[Record]:
        """Next records, at most `limit`; [] when none came in time. Raises OffsetGone."""

    def assignment(self) -> frozenset[int]:
        """Partitions this consumer reads at present; changes only inside `poll`."""

    def seek(self, offsets: Mapping[int, int]) -> None:
        """Read on from these offsets (partition -> offset of the next record)."""

    def commit(self, offsets: Mapping[int, int]) -> None:
        """Remember for the group where reading starts again. Partitions no longer assigned are left out."""

    def ends(self) -> dict[int, int]:
        """Offset after the last record, for every partition of the topic."""

    def close(self) -> None:
        """Leave the group; its partitions go to the other members."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Bus(Protocol):
    """A log of named topics."""

    def create_topics(self, partitions: Mapping[str, int]) -> None:
        """Make these topics if they are missing. Raises ValueError if one exists with other partitions."""

    def publish(self, topic: str, records: Sequence[Outgoing]) -> list[Position]:
        """Append the records, durably; in their order, but for an outage. Positions in the same order."""

    def consumer(self, topic: str, *, group: str | None = None, member: str = "") -> Consumer:
        """A reader. Without a group: all partitions from the start, nothing remembered."""

    def close(self) -> None:
        """Let go of the log; consumers are closed on their own."""


def partition_of(key: str, partitions: int) -> int:
    """Partition of a key: the same in every process and every release.

    >>> partition_of("g000007", 4)
    3
    """
    return zlib.crc32(key.encode()) % partitions
