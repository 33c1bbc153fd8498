"""What a worker publishes, and what of its tasks is thereby done.

A task counts as done only when every trajectory of it stands on the log; until then a restart samples it again (the
learner knows trajectories by their ids, so that costs time only).
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from msgspec import Struct

from common.bus.port import Bus, Outgoing
from common.messages import DEAD_LETTERS, TRAJECTORIES, WORKERS, DeadLetter, FromWorker, encode

BATCH = 256


@dataclass(frozen=True, slots=True)
class _Waiting:
    topic: str
    record: Outgoing
    done: Callable[[], None]


class Outbox:
    """Publishes in batches, in order; `done` is called after its record is durable."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._waiting: asyncio.Queue[_Waiting] = asyncio.Queue()
        self._unpublished = 0
        self._empty = asyncio.Event()
        self._empty.set()

    def put_trajectory(self, record: Struct, *, group: str, trajectory: str, done: Callable[[], None]) -> None:
        """A trajectory's end."""
        self._put(TRAJECTORIES, Outgoing(group, encode(record), {"trajectory": trajectory}), done)

    def put_from_worker(self, record: FromWorker) -> None:
        """What became of an update, or how the worker fares."""
        self._put(WORKERS, Outgoing(record.worker, encode(record)), lambda: None)

    def put_dead_letter(self, record: DeadLetter, *, done: Callable[[], None]) -> None:
        """A record that could not be used."""
        self._put(DEAD_LETTERS, Outgoing(record.key, encode(record)), done)

    async def run(self) -> None:
        """Publish for ever. Whatever the bus raises ends the worker: nothing is acknowledged that is not durable."""
        while True:
            batch = [await self._waiting.get()]
            while len(batch) < BATCH and not self._waiting.empty():
                batch.append(self._waiting.get_nowait())
            for topic in dict.fromkeys(waiting.topic for waiting in batch):
                records = [waiting.record for waiting in batch if waiting.topic == topic]
                await asyncio.to_thread(self._bus.publish, topic, records)
            for waiting in batch:
                waiting.done()
            self._unpublished -= len(batch)
            if not self._unpublished:
                self._empty.set()

    async def flushed(self) -> None:
        """Wait until everything put so far is durable."""
        await self._empty.wait()

    def _put(self, topic: str, record: Outgoing, done: Callable[[], None]) -> None:
        self._unpublished += 1
        self._empty.clear()
        self._waiting.put_nowait(_Waiting(topic, record, done))
