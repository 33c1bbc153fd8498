"""Publishes a worker's records and calls back when they are durable.

A task is done once all its trajectories are on the log. Until then, a restarted worker samples it again. The learner
identifies trajectories by their ids, so a repeated trajectory costs only time.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from msgspec import Struct

from palimpsest.common.bus.port import Bus, Outgoing, Position
from palimpsest.common.messages import (
    DEAD_LETTERS,
    TRAJECTORIES,
    WORKERS,
    DeadLetter,
    FromWorker,
    SegmentFlushed,
    encode,
)

BATCH = 256
DEAD_LETTER_BYTES = 64 * 2**20
"""Size of the queued dead letters from which on the readers of the log wait."""


@dataclass(frozen=True, slots=True)
class _PendingRecord:
    topic: str
    record: Outgoing
    done: Callable[[], None]


class Outbox:
    """Publishes records in batches, in order, and calls `done` after a record is durable."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._waiting: asyncio.Queue[_PendingRecord] = asyncio.Queue()
        self._put_so_far = self._durable = 0
        self._dead_letter_bytes = 0
        self._progress = asyncio.Condition()
        self.positions: dict[int, int] = {}
        """Topic `trajectories`: partition -> offset after the last durable record of this outbox."""

    def put_trajectory(self, record: Struct, *, group: str, trajectory: str, done: Callable[[], None]) -> None:
        """Queue the record of an ended trajectory."""
        self._put(TRAJECTORIES, Outgoing(group, encode(record), {"trajectory": trajectory}), done)

    def put_flush(self, record: SegmentFlushed) -> None:
        """Queue a flush. It has no `trajectory` header, because an unreadable flush does not lose the trajectory."""
        self._put(TRAJECTORIES, Outgoing(record.group, encode(record)), lambda: None)

    def put_from_worker(self, record: FromWorker) -> None:
        """Queue the outcome of an update or a cut, or a heartbeat."""
        self._put(WORKERS, Outgoing(record.worker, encode(record)), lambda: None)

    def put_dead_letter(self, record: DeadLetter, *, done: Callable[[], None]) -> None:
        """Queue a dead letter: a record that could not be used."""
        self._put(DEAD_LETTERS, Outgoing(record.key, encode(record)), done)

    async def run(self) -> None:
        """Publish queued records in an endless loop. An error of the bus ends the worker without an acknowledgment."""
        while True:
            batch = [await self._waiting.get()]
            while len(batch) < BATCH and not self._waiting.empty():
                batch.append(self._waiting.get_nowait())
            for topic in dict.fromkeys(waiting.topic for waiting in batch):
                records = [waiting.record for waiting in batch if waiting.topic == topic]
                positions = await asyncio.to_thread(self._bus.publish, topic, records)
                if topic == TRAJECTORIES:
                    self._note(positions)
            for waiting in batch:
                waiting.done()
            async with self._progress:
                self._durable += len(batch)
                self._dead_letter_bytes -= sum(_size(waiting.topic, waiting.record) for waiting in batch)
                self._progress.notify_all()

    async def room(self) -> None:
        """Wait until fewer than DEAD_LETTER_BYTES of dead letters are queued.

        The readers of the log call this: a flood of unusable records, read faster than dead letters are published, must
        not fill the memory. The number of trajectories is bounded by the offers of the learner.
        """
        async with self._progress:
            await self._progress.wait_for(lambda: self._dead_letter_bytes < DEAD_LETTER_BYTES)

    async def flush(self) -> None:
        """Wait until all records queued before the call are durable."""
        target = self._put_so_far
        async with self._progress:
            await self._progress.wait_for(lambda: self._durable >= target)

    def _note(self, positions: Sequence[Position]) -> None:
        for at in positions:
            self.positions[at.partition] = max(self.positions.get(at.partition, 0), at.offset + 1)

    def _put(self, topic: str, record: Outgoing, done: Callable[[], None]) -> None:
        self._put_so_far += 1
        self._dead_letter_bytes += _size(topic, record)
        self._waiting.put_nowait(_PendingRecord(topic, record, done))


def _size(topic: str, record: Outgoing) -> int:
    return len(record.body) + len(record.key) if topic == DEAD_LETTERS else 0
