"""Simulated rollout streams: a stream takes an offered trajectory, waits, and publishes it.

A process drives many streams. Each stream has its own pace, so trajectories end out of order. Some trajectories are
published twice, as after a restart of a worker, and some are dropped.
"""

import heapq
import random
import time
from collections import deque
from contextlib import closing
from dataclasses import dataclass
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Event

from bench.records import Maker
from bench.runs import NoClaims
from palimpsest.common.bus.factory import connect
from palimpsest.common.bus.port import Outgoing
from palimpsest.common.config.schema import RunConfig
from palimpsest.common.messages import (
    TASKS,
    TRAJECTORIES,
    DropReason,
    GroupOffered,
    TrajectoryDropped,
    decode,
    encode,
    trajectory_id as id_of,
)
from palimpsest.services.rollout.outbox import BATCH

SENT = "sent"
"""Header with the time of the first publication, Unix seconds."""
REMEMBERED = 256
"""A duplicate repeats one of this many newest records."""
SPREAD = 0.2
"""Standard deviation of the logarithm of paces: two thirds are within a factor of 1.22 of the median."""
LONGEST_WAIT_S = 0.05


@dataclass(frozen=True, slots=True)
class Streams:
    """Settings of one process."""

    config: RunConfig
    process: int
    processes: int
    streams: int
    tokens: int
    """Mean length in tokens. Lengths are uniform from 0.5 to 1.5 of the mean."""
    pace_s: float
    """Median seconds of a trajectory."""
    duplicates: float
    """Share of records published again later."""
    dropped: float
    """Share of trajectories dropped."""


def drive(streams: Streams, published: "Synchronized[int]", stop: Event) -> None:
    """Run the streams until `stop`. `published` counts the records on the log."""
    bus = connect(streams.config, NoClaims())
    driver = _Driver(streams)
    with closing(bus), bus.consumer(TASKS) as tasks:
        while not stop.is_set():
            for record in tasks.poll(limit=BATCH, timeout_s=driver.pause()):
                driver.offered(decode(TASKS, record.body))
            if batch := driver.finished():
                bus.publish(TRAJECTORIES, batch)
                with published.get_lock():
                    published.value += len(batch)


class _Driver:
    """The streams of one process and their trajectories."""

    def __init__(self, streams: Streams) -> None:
        self._of = streams
        self._random = random.Random(streams.process)  # noqa: S311
        self._maker = Maker(streams.process)
        self._paces = [streams.pace_s * self._random.lognormvariate(0, SPREAD) for _ in range(streams.streams)]
        self._idle = list(range(streams.streams))
        self._busy: list[tuple[float, int, GroupOffered, int]] = []
        """End time, stream, offer, sample number."""
        self._waiting: deque[tuple[GroupOffered, int]] = deque()
        self._last: deque[Outgoing] = deque(maxlen=REMEMBERED)

    def offered(self, offer: GroupOffered) -> None:
        """Take the group if it belongs to this process. Every process reads every offer."""
        if offer.index % self._of.processes == self._of.process:
            self._waiting += [(offer, sample) for sample in range(offer.samples)]

    def pause(self) -> float:
        """Return the seconds until the next trajectory ends."""
        until = self._busy[0][0] - time.monotonic() if self._busy else LONGEST_WAIT_S
        return min(max(0.0, until), LONGEST_WAIT_S)

    def finished(self) -> list[Outgoing]:
        """Return ended trajectories, at most a batch. Free streams start waiting trajectories."""
        now = time.monotonic()
        batch: list[Outgoing] = []
        while self._busy and self._busy[0][0] <= now and len(batch) < BATCH:
            _, stream, offer, sample = heapq.heappop(self._busy)
            self._idle.append(stream)
            batch.append(self._end(stream, offer, sample))
            if self._random.random() < self._of.duplicates:
                batch.append(self._random.choice(self._last))
        while self._idle and self._waiting:
            stream = self._idle.pop(self._random.randrange(len(self._idle)))
            offer, sample = self._waiting.popleft()
            until = now + self._paces[stream] * self._random.uniform(0.75, 1.25)
            heapq.heappush(self._busy, (until, stream, offer, sample))
        return batch

    def _end(self, stream: int, offer: GroupOffered, sample: int) -> Outgoing:
        worker = f"worker-{self._of.process}-{stream}"
        trajectory = id_of(offer.group, sample)
        if self._random.random() < self._of.dropped:
            reason = DropReason.ENVIRONMENT_FAILED
            body = encode(TrajectoryDropped(offer.run, trajectory, offer.group, worker, reason, "simulated"))
        else:
            tokens = self._random.randint(self._of.tokens // 2, self._of.tokens * 3 // 2)
            body = encode(
                self._maker.finished(
                    offer.group, sample, tokens=tokens, run=offer.run, worker=worker, version=offer.version
                )
            )
        record = Outgoing(offer.group, body, {"trajectory": trajectory, SENT: repr(time.time())})
        self._last.append(record)
        return record
