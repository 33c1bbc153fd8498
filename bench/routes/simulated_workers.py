"""Simulated workers: they take offers, sample random tokens, and pause at a cut as real workers do.

A trajectory is a prompt, a model message, a tool call with a duration, and a second message. Versions change during a
trajectory, so its tokens have one or several versions. The unit of time is a batch: at a pace of 2 s per batch, all
streams together sample the tokens of a version in 2 s. Time passes only during `drive`.
"""

import math
import random
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from bench.routes.variants import Load
from palimpsest.common.arrays import Float32Array, Int32Array, pack_float32, pack_int32
from palimpsest.common.bus.port import Bus, Outgoing
from palimpsest.common.messages import (
    CONTROL,
    TASKS,
    TRAJECTORIES,
    WORKERS,
    CutReached,
    CutRequested,
    Ending,
    FromWorker,
    GroupOffered,
    SegmentFlushed,
    TrajectoryFinished,
    VersionApplied,
    VersionPublished,
    WorkerAlive,
    decode,
    encode,
    trajectory_id,
)
from palimpsest.common.trajectory import Segment
from palimpsest.common.versions import UNTRAINABLE, Version
from palimpsest.services.rollout.cut_state import CutState

POLL_RECORDS = 512
MESSAGE = 0.2
"""Duration of a model message, in batches."""
LONGEST_CALL = 1.2
"""Maximum duration of a tool call, in batches. Durations are uniform from 0."""
MEAN_DURATION = 2 * MESSAGE + LONGEST_CALL / 2
"""Mean duration of a trajectory from its first token to its last, in batches."""
PAUSE_S = 0.04
"""Seconds from the request to pause an engine until it pauses. vLLM took 30 to 50 ms."""
ALIVE_S = 2.0
SPREAD = 0.1
"""Standard deviation of the behavior log-probs around that of a uniform distribution, nats."""


@dataclass(eq=False)
class LiveTrajectory:
    """A trajectory that is being sampled. Its tokens are known from the start; sampling assigns their versions."""

    offer: GroupOffered
    trajectory: str
    worker: str
    tokens: Int32Array
    messages: tuple[tuple[int, int], tuple[int, int]]
    """[start, stop) of each model message."""
    behavior: Float32Array
    versions: Int32Array
    call: float
    """Remaining duration of its tool call, in batches."""
    turn: int = 0
    sampled: float = 0.0
    """Sampled tokens of the current message."""
    flushed: int = 0
    """Tokens in its newest flush."""

    def sample(self, batches: float, version: Version) -> float:
        """Sample for this duration. Returns the duration that remains after the end of the message."""
        start, stop = self.messages[self.turn]
        rate = (stop - start) / MESSAGE
        before = start + math.floor(self.sampled)
        spent = min(batches, (stop - start - self.sampled) / rate)
        self.sampled = stop - start if spent < batches else self.sampled + spent * rate
        self.versions[before : start + math.floor(self.sampled)] = version
        return batches - spent

    @property
    def length(self) -> int:
        """Number of tokens so far."""
        return self.messages[self.turn][0] + math.floor(self.sampled)

    def segments(self) -> tuple[Segment, ...]:
        """Return the segments so far."""
        segments = []
        for start, stop in self.messages[: self.turn + 1]:
            versions = self.versions[start : min(stop, self.length)]
            edges = [0, *(np.flatnonzero(np.diff(versions)) + 1).tolist(), len(versions)]
            segments += [self._segment(start + a, start + b) for a, b in pairwise(edges) if b > a]
        return tuple(segments)

    def _segment(self, start: int, stop: int) -> Segment:
        return Segment(start, stop, Version(int(self.versions[start])), pack_float32(self.behavior[start:stop]))


@dataclass
class Worker:
    """A simulated worker."""

    name: str
    positions: dict[int, int] = field(default_factory=dict)
    """Offset after the worker's last record, by partition of `trajectories`."""


class SimulatedWorkers:
    """The workers of one run. The caller of `drive` runs them."""

    def __init__(
        self, bus: Bus, *, run: str, load: Load, vocabulary: int, seed: int, workers: int = 2,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._clock = clock
        self._bus, self._run, self._load, self._vocabulary = bus, run, load, vocabulary
        self._random, self._numbers = random.Random(seed), np.random.default_rng(seed)  # noqa: S311
        self._workers = [Worker(f"worker-{i}") for i in range(workers)]
        self._streams = max(1, round(MEAN_DURATION * load.trajectories))
        self._closing = ExitStack()
        self._tasks = self._closing.enter_context(bus.consumer(TASKS))
        self._control = self._closing.enter_context(bus.consumer(CONTROL))
        self._waiting: deque[tuple[GroupOffered, int]] = deque()
        self._live: list[LiveTrajectory] = []
        self._cuts = CutState()
        self._version = Version(-1)
        self._last = self._alive_at = float("-inf")
        self._requested_at = 0.0
        self._reached = 0
        self._begun = 0
        self.finished_at: dict[str, float] = {}
        """Time of `clock` at which the log had the record, by trajectory."""
        self.holds: list[float] = []
        """Seconds of each pause for a cut."""
        self.flushed = 0
        """Number of flushed records of live trajectories."""

    def resume_clock(self) -> None:
        """Let time pass again. The time since the last `drive` does not count."""
        self._last, self._alive_at = self._clock(), float("-inf")

    def drive(self, batch_s: float) -> None:
        """Do all work that is due. batch_s: seconds in which the streams together sample a batch."""
        now = self._clock()
        batches, self._last = (now - self._last) / batch_s, now
        self._read_topics(now)
        finished = list(self._sample(batches))
        self._publish(finished)
        for live in finished:
            self.finished_at[live.trajectory] = self._clock()
        self._answer_cut(now)
        if now - self._alive_at > ALIVE_S:
            self._alive_at = now
            self._report(*(self._alive(worker) for worker in self._workers))

    def close(self) -> None:
        """Close the log."""
        self._closing.close()
        self._bus.close()

    def _read_topics(self, now: float) -> None:
        for record in self._tasks.poll(limit=POLL_RECORDS, timeout_s=0.0):
            offer: GroupOffered = decode(TASKS, record.body)
            self._waiting += [(offer, sample) for sample in range(offer.samples)]
        for record in self._control.poll(limit=POLL_RECORDS, timeout_s=0.0):
            message = decode(CONTROL, record.body)
            open_before = self._cuts.open
            self._cuts.observe(message)
            if isinstance(message, CutRequested):
                self._requested_at = now
            elif open_before is not None and self._cuts.open is None:
                self.holds.append(now - self._requested_at)
            if isinstance(message, VersionPublished):
                self._version = message.version
                self._report(*(self._applied(worker, message) for worker in self._workers))

    def _sample(self, batches: float) -> Iterator[LiveTrajectory]:
        """Advance the time. Yields the trajectories that end."""
        paused = self._cuts.open is not None or self._version <= self._cuts.held
        while self._waiting and len(self._live) < self._streams and self._version >= 0:
            self._live.append(self._begin(*self._waiting.popleft()))
        continuing = []
        for live in self._live:
            if self._advance(live, batches, paused=paused):
                yield live
            else:
                continuing.append(live)
        self._live = continuing

    def _advance(self, live: LiveTrajectory, batches: float, *, paused: bool) -> bool:
        """Advance one trajectory. Returns whether it ends. A tool call continues while the engine is paused."""
        left = batches
        if live.turn == 0:
            if not paused:
                left = live.sample(left, self._version)
            if live.length < live.messages[0][1]:
                return False
            spent = min(left, live.call)
            live.call, left = live.call - spent, left - spent
            if live.call > 0:
                return False
            live.turn, live.sampled = 1, 0.0
        if not paused:
            live.sample(left, self._version)
        return live.length == live.messages[1][1]

    def _begin(self, offer: GroupOffered, sample: int) -> LiveTrajectory:
        length = self._random.randint(self._load.tokens // 2, self._load.tokens * 3 // 2)
        eighth = max(1, length // 8)
        behavior = -math.log(self._vocabulary) + SPREAD * self._numbers.standard_normal(length)
        self._begun += 1
        return LiveTrajectory(
            offer=offer,
            trajectory=trajectory_id(offer.group, sample),
            worker=self._workers[self._begun % len(self._workers)].name,
            tokens=self._numbers.integers(0, self._vocabulary, length, dtype=np.int32),
            messages=((eighth, 4 * eighth), (5 * eighth, length)),
            behavior=behavior.astype(np.float32),
            versions=np.full(length, UNTRAINABLE, dtype=np.int32),
            call=self._random.uniform(0, LONGEST_CALL),
        )

    def _answer_cut(self, now: float) -> None:
        """Once the engines are paused, flush the live trajectories and report that the cut is reached."""
        request = self._cuts.open
        if request is None or request.cut <= self._reached or now < self._requested_at + PAUSE_S:
            return
        self._reached = request.cut
        before = self.flushed
        self._publish([live for live in self._live if self._is_new(live, request.version)], cut=request.cut)
        self._report(
            *(
                CutReached(
                    run=self._run, worker=worker.name, cut=request.cut, version=request.version,
                    positions=dict(worker.positions), flushed=self.flushed - before, pause_s=PAUSE_S,
                )
                for worker in self._workers
            )
        )  # fmt: skip

    def _is_new(self, live: LiveTrajectory, version: Version) -> bool:
        """Return whether it has tokens of this version that are not flushed."""
        return bool((live.versions[live.flushed : live.length] == version).any())

    def _publish(self, lives: Sequence[LiveTrajectory], *, cut: int | None = None) -> None:
        """Publish finished trajectories, or with `cut` the live ones so far."""
        records = [self._finished(live) if cut is None else self._flush(live, cut) for live in lives]
        placed = self._bus.publish(
            TRAJECTORIES, [Outgoing(r.group, encode(r), {"trajectory": r.trajectory}) for r in records]
        )
        workers = {worker.name: worker for worker in self._workers}
        for live, at in zip(lives, placed, strict=True):
            workers[live.worker].positions[at.partition] = at.offset + 1

    def _finished(self, live: LiveTrajectory) -> TrajectoryFinished:
        reward = self._random.random()
        return TrajectoryFinished(
            run=self._run,
            trajectory=live.trajectory,
            group=live.offer.group,
            attempt=0,
            worker=live.worker,
            environment=live.offer.environment,
            environment_version="1",
            tokens=pack_int32(live.tokens),
            segments=live.segments(),
            temperature=live.offer.sampling.temperature,
            reward=reward,
            reward_parts={},
            success=reward > 0.5,
            ending=Ending.TERMINATED,
            turns=2,
        )

    def _flush(self, live: LiveTrajectory, cut: int) -> SegmentFlushed:
        live.flushed = live.length
        self.flushed += 1
        return SegmentFlushed(
            run=self._run,
            trajectory=live.trajectory,
            group=live.offer.group,
            attempt=0,
            worker=live.worker,
            cut=cut,
            tokens=pack_int32(live.tokens[: live.length]),
            segments=live.segments(),
            temperature=live.offer.sampling.temperature,
        )

    def _report(self, *messages: FromWorker) -> None:
        self._bus.publish(WORKERS, [Outgoing(message.worker, encode(message)) for message in messages])

    def _alive(self, worker: Worker) -> WorkerAlive:
        return WorkerAlive(
            self._run, worker.name, version=self._version, live=len(self._live), sampled_tokens=0, seconds=0.0,
            idle_s=0.0,
        )  # fmt: skip

    def _applied(self, worker: Worker, message: VersionPublished) -> VersionApplied:
        return VersionApplied(
            self._run, worker.name, version=message.version, digest=message.digest, accepted=True, canary_error=0.0,
            pause_s=0.0, live=len(self._live),
        )  # fmt: skip
