"""Follows the heartbeats of the workers, to show what each of them waits for. Nothing depends on it but displays."""

import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass

from palimpsest.common.bus.port import Bus, Consumer, OffsetGone
from palimpsest.common.logs import logger
from palimpsest.common.messages import WORKERS, WorkerAlive
from palimpsest.common.rejected_record import RejectedRecord
from palimpsest.services.learner.ingest.decoding import decode_for_run

POLL_RECORDS = 256
POLL_S = 0.5
RETRY_S = 10.0
MOST_WORKERS = 1000
"""Workers that are kept; the one that was silent for longest is forgotten first."""


@dataclass(frozen=True, slots=True)
class WorkerState:
    """The newest heartbeat of a worker."""

    alive: WorkerAlive
    heard: float
    """When it arrived, in seconds of the clock."""
    idle_since: float | None
    """When the worker was first seen without a trajectory in flight; None while it has one."""


class WorkerStates:
    """The newest heartbeat of each worker. The thread of WorkerWatch writes; the HTTP thread reads."""

    def __init__(self) -> None:
        self._states: dict[str, WorkerState] = {}

    def observe(self, alive: WorkerAlive, *, now: float) -> None:
        """Enter a heartbeat."""
        before = self._states.pop(alive.worker, None)
        since = None if alive.live else (before.idle_since if before and before.idle_since is not None else now)
        states = {**self._states, alive.worker: WorkerState(alive, now, since)}
        for name in list(states)[: max(0, len(states) - MOST_WORKERS)]:
            del states[name]
        self._states = states

    def states(self) -> dict[str, WorkerState]:
        """Return worker -> state."""
        return self._states


class WorkerWatch:
    """Reads topic `workers` on its own thread and connection, from the end of the topic."""

    def __init__(self, open_bus: Callable[[], Bus], *, run: str) -> None:
        self._open_bus, self._run = open_bus, run
        self._stopping = threading.Event()
        self.seen = WorkerStates()
        self._thread = threading.Thread(target=self._work, name="worker-watch", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """End the thread. It ends by itself if the log does not answer."""
        self._stopping.set()
        self._thread.join(timeout=2 * POLL_S)

    def _work(self) -> None:
        while not self._stopping.is_set():
            try:
                with closing(self._open_bus()) as bus, bus.consumer(WORKERS) as consumer:
                    consumer.seek(consumer.ends())
                    self._follow(consumer)
            except Exception as error:  # a display must not end a run
                logger().warning("the page does not see the workers", error=str(error), retried_after_s=RETRY_S)
                self._stopping.wait(RETRY_S)

    def _follow(self, consumer: Consumer) -> None:
        while not self._stopping.is_set():
            try:
                records = consumer.poll(limit=POLL_RECORDS, timeout_s=POLL_S)
            except OffsetGone:
                consumer.seek(consumer.ends())
                continue
            for record in records:
                try:
                    message = decode_for_run(record, self._run)
                except RejectedRecord:
                    continue  # the reader that uses the records dead-letters it
                if isinstance(message, WorkerAlive):
                    self.seen.observe(message, now=time.monotonic())
