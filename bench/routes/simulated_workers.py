"""Simulated workers: they take offers, sample nothing but numbers, and stand still at a cut as real ones do.

A trajectory is a prompt, a model message, a tool call that takes a while, and a second message. Meanwhile versions
change, so its tokens are of one version or of several. Sampling is counted in batches: at a pace of 2 s a batch, all
streams together sample what a version is trained on in 2 s. Time passes only while the fleet is driven.
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
"""Batches of time in which a model message is sampled."""
LONGEST_CALL = 1.2
"""Most batches of time that a tool call takes; evenly spread from 0."""
USUAL = 2 * MESSAGE + LONGEST_CALL / 2
"""Mean batches of time from a trajectory's first token to its last."""
PAUSE_S = 0.04
"""An engine that is asked to stand still does so after this: 30 to 50 ms were measured with vLLM."""
ALIVE_S = 2.0
SPREAD = 0.1
"""Deviation of a behavior log-prob from that of an even distribution, nats."""


@dataclass(eq=False)
class Live:
    """A trajectory under way. Its tokens stand from the start; what counts is who samples them when."""

    offer: GroupOffered
    trajectory: str
    worker: str
    tokens: Int32Array
    messages: tuple[tuple[int, int], tuple[int, int]]
    """[start, stop) of each model message."""
    behavior: Float32Array
    versions: Int32Array
    call: float
    """Batches of time that its tool call still takes."""
    turn: int = 0
    sampled: float = 0.0
    """Tokens of the present message so far."""
    flushed: int = 0

    def sample(self, batches: float, version: Version) -> float:
        """Sample for so much time; what is left of it."""
        start, stop = self.messages[self.turn]
        rate = (stop - start) / MESSAGE
        before = start + math.floor(self.sampled)
        spent = min(batches, (stop - start - self.sampled) / rate)
        self.sampled = stop - start if spent < batches else self.sampled + spent * rate
        self.versions[before : start + math.floor(self.sampled)] = version
        return batches - spent

    @property
    def length(self) -> int:
        """Tokens so far."""
        return self.messages[self.turn][0] + math.floor(self.sampled)

    def segments(self) -> tuple[Segment, ...]:
        """Who sampled what, so far."""
        found = []
        for start, stop in self.messages[: self.turn + 1]:
            versions = self.versions[start : min(stop, self.length)]
            edges = [0, *(np.flatnonzero(np.diff(versions)) + 1).tolist(), len(versions)]
            found += [self._segment(start + a, start + b) for a, b in pairwise(edges) if b > a]
        return tuple(found)

    def _segment(self, start: int, stop: int) -> Segment:
        return Segment(start, stop, Version(int(self.versions[start])), pack_float32(self.behavior[start:stop]))


@dataclass
class Worker:
    """One of the fleet."""

    name: str
    positions: dict[int, int] = field(default_factory=dict)
    """Partition of `trajectories` -> offset after its last record."""
    applied: Version | None = None


class SimulatedWorkers:
    """The workers of one run, driven by whoever calls `drive`."""

    def __init__(
        self, bus: Bus, *, run: str, load: Load, vocabulary: int, seed: int, workers: int = 2,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._clock = clock
        self._bus, self._run, self._load, self._vocabulary = bus, run, load, vocabulary
        self._random, self._numbers = random.Random(seed), np.random.default_rng(seed)  # noqa: S311
        self._workers = [Worker(f"worker-{i}") for i in range(workers)]
        self._streams = max(1, round(USUAL * load.trajectories))
        self._closing = ExitStack()
        self._tasks = self._closing.enter_context(bus.consumer(TASKS))
        self._control = self._closing.enter_context(bus.consumer(CONTROL))
        self._waiting: deque[tuple[GroupOffered, int]] = deque()
        self._live: list[Live] = []
        self._cuts = CutState()
        self._version = Version(-1)
        self._last = self._alive_at = float("-inf")
        self._asked_at = 0.0
        self._reached = 0
        self._begun = 0
        self.finished_at: dict[str, float] = {}
        """Trajectory -> time at which its record stood on the log, by `clock`."""
        self.holds: list[float] = []
        """Seconds for which the fleet stood still, each time."""
        self.flushed = 0
        """Records of live trajectories sent ahead."""

    def wake(self) -> None:
        """Time passes again; what passed meanwhile does not count."""
        self._last, self._alive_at = self._clock(), float("-inf")

    def drive(self, batch_s: float) -> None:
        """Do all that is due. batch_s: seconds in which the streams together sample a batch."""
        now = self._clock()
        batches, self._last = (now - self._last) / batch_s, now
        self._hear(now)
        finished = list(self._sample(batches))
        self._publish(finished)
        for live in finished:
            self.finished_at[live.trajectory] = self._clock()
        self._answer(now)
        if now - self._alive_at > ALIVE_S:
            self._alive_at = now
            self._say(*(self._alive(worker) for worker in self._workers))

    def close(self) -> None:
        """Let go of the log."""
        self._closing.close()
        self._bus.close()

    def _hear(self, now: float) -> None:
        for record in self._tasks.poll(limit=POLL_RECORDS, timeout_s=0.0):
            offer: GroupOffered = decode(TASKS, record.body)
            self._waiting += [(offer, sample) for sample in range(offer.samples)]
        for record in self._control.poll(limit=POLL_RECORDS, timeout_s=0.0):
            message = decode(CONTROL, record.body)
            stood = self._cuts.open
            self._cuts.observe(message)
            if isinstance(message, CutRequested):
                self._asked_at = now
            elif stood is not None and self._cuts.open is None:
                self.holds.append(now - self._asked_at)
            if isinstance(message, VersionPublished):
                self._version = message.version
                self._say(*(self._applied(worker, message) for worker in self._workers))

    def _sample(self, batches: float) -> Iterator[Live]:
        """Let so much time pass; those that end meanwhile."""
        still = self._cuts.open is not None or self._version <= self._cuts.held
        while self._waiting and len(self._live) < self._streams and self._version >= 0:
            self._live.append(self._begin(*self._waiting.popleft()))
        going = []
        for live in self._live:
            if self._ends(live, batches, still=still):
                yield live
            else:
                going.append(live)
        self._live = going

    def _ends(self, live: Live, batches: float, *, still: bool) -> bool:
        """Let time pass for one; whether it ends. A tool call goes on while the engine stands still."""
        left = batches
        if live.turn == 0:
            if not still:
                left = live.sample(left, self._version)
            if live.length < live.messages[0][1]:
                return False
            spent = min(left, live.call)
            live.call, left = live.call - spent, left - spent
            if live.call > 0:
                return False
            live.turn, live.sampled = 1, 0.0
        if not still:
            live.sample(left, self._version)
        return live.length == live.messages[1][1]

    def _begin(self, offer: GroupOffered, sample: int) -> Live:
        length = self._random.randint(self._load.tokens // 2, self._load.tokens * 3 // 2)
        eighth = max(1, length // 8)
        behavior = -math.log(self._vocabulary) + SPREAD * self._numbers.standard_normal(length)
        self._begun += 1
        return Live(
            offer=offer,
            trajectory=trajectory_id(offer.group, sample),
            worker=self._workers[self._begun % len(self._workers)].name,
            tokens=self._numbers.integers(0, self._vocabulary, length, dtype=np.int32),
            messages=((eighth, 4 * eighth), (5 * eighth, length)),
            behavior=behavior.astype(np.float32),
            versions=np.full(length, UNTRAINABLE, dtype=np.int32),
            call=self._random.uniform(0, LONGEST_CALL),
        )

    def _answer(self, now: float) -> None:
        """Flush what lives and say so, once the engines stand still."""
        request = self._cuts.open
        if request is None or request.cut <= self._reached or now < self._asked_at + PAUSE_S:
            return
        self._reached = request.cut
        before = self.flushed
        self._publish([live for live in self._live if self._is_new(live, request.version)], cut=request.cut)
        self._say(
            *(
                CutReached(
                    run=self._run, worker=worker.name, cut=request.cut, version=request.version,
                    positions=dict(worker.positions), flushed=self.flushed - before, pause_s=PAUSE_S,
                )
                for worker in self._workers
            )
        )  # fmt: skip

    def _is_new(self, live: Live, version: Version) -> bool:
        """Whether it has tokens of the version that were not sent ahead yet."""
        return bool((live.versions[live.flushed : live.length] == version).any())

    def _publish(self, lives: Sequence[Live], *, cut: int | None = None) -> None:
        """Records of trajectories: whole ones, or so far for a cut."""
        records = [self._finished(live) if cut is None else self._flush(live, cut) for live in lives]
        placed = self._bus.publish(
            TRAJECTORIES, [Outgoing(r.group, encode(r), {"trajectory": r.trajectory}) for r in records]
        )
        of = {worker.name: worker for worker in self._workers}
        for live, at in zip(lives, placed, strict=True):
            of[live.worker].positions[at.partition] = at.offset + 1

    def _finished(self, live: Live) -> TrajectoryFinished:
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

    def _flush(self, live: Live, cut: int) -> SegmentFlushed:
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

    def _say(self, *messages: FromWorker) -> None:
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
