"""Runs in simulated time: four real workers, the real cut coordinator, and random faults between them.

Workers, engines and the learner die and restart. The learner fails in the middle of a cut, or pauses, is replaced and
resumes. Acknowledgements are late, engines pause slowly, tools answer slowly, sessions fail. The log holds copies of
records, returns only some of its records, or has outages for all or for one process. Tasks are delivered twice. A seed
repeats a run exactly.
"""

import asyncio
import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from palimpsest.common.bus.port import Outgoing, Record
from palimpsest.common.messages import (
    CONTROL,
    DEAD_LETTERS,
    OLD_LOGPROBS,
    TASKS,
    TOPICS,
    TRAJECTORIES,
)
from palimpsest.common.snapshots.manifest import SCHEMA, Canary, Manifest
from palimpsest.common.versions import Version
from palimpsest.services.learner.old_logprobs.interruption import coordinator as asking
from palimpsest.services.rollout import cut_responder, worker as worker_module
from palimpsest.services.rollout.engine.port import EngineDead
from palimpsest.services.rollout.worker import Worker
from tests.simulation.cut_learner import RUN, Learner, LearnerCheckpoint
from tests.simulation.cut_worker import Engine, a_worker, process_name
from tests.simulation.memory_bus import MemoryBus
from tests.simulation.score_checker import ScoreChecker
from tests.simulation.simulated_time import Actor, NotYet, SimulatedLoop, SimulatedStore

WORKERS_AT_WORK = 4
VERSIONS = 3
"""Versions that a run trains."""
LIMIT_S = 1500.0
"""Simulated seconds. A longer run is stuck."""
CANARY = Canary((1, 2, 3), (1, 2), (-1.0, -2.0), previous=())
ALL = ""
FIRST_TOKEN = 1000
"""Smallest number of a sampled token."""


@dataclass
class Schedule:
    """One run: its random numbers, its log, its checker."""

    loop: SimulatedLoop
    random: random.Random
    folder: Path
    checker: ScoreChecker = field(default_factory=ScoreChecker)
    numbers: "itertools.count[int]" = field(default_factory=lambda: itertools.count(FIRST_TOKEN))
    checkpoints: list[LearnerCheckpoint] = field(default_factory=lambda: [LearnerCheckpoint()])
    """The learner's checkpoints."""
    at_work: list[Worker] = field(default_factory=list)
    engines: dict[str, Engine] = field(default_factory=dict)
    """Worker process -> its engine."""
    death_signals: "dict[str, asyncio.Future[None]]" = field(default_factory=dict)
    """Worker process -> future; the process dies when the future is done."""
    lives: list[str] = field(default_factory=list)
    """All processes that started so far."""
    silent: dict[str, float] = field(default_factory=lambda: {ALL: 0.0})
    """End of the present outage, for all or for one process."""
    writer: int = 0
    """Epoch of the learner that has the run."""
    over: bool = False
    sleeps: bool = False
    """Whether the engines sleep at a cut."""

    def __post_init__(self) -> None:
        self.store = SimulatedStore(self.loop, self._note, self._available, self._silent_until)
        self.bus = MemoryBus(self.store, lease_s=60.0)
        self.bus.create_topics(dict.fromkeys(TOPICS, 1) | {TASKS: 8, TRAJECTORIES: 2, OLD_LOGPROBS: 2})
        self.copies, self.deaths, self.outages = self.chance(0.3), self.chance(0.7), self.chance(0.3)
        self.hesitates, self._copying = self.chance(0.3), False

    def chance(self, likely: float) -> bool:
        return self.random.random() < likely

    def delay_s(self, most_s: float) -> float:
        """Random delay, seconds; small delays are the most frequent."""
        return most_s * self.random.random() ** 3

    async def run(self) -> None:
        """Run until the learner has trained all versions and the workers have stopped."""
        workers = [asyncio.create_task(self._worker(f"worker-{i}")) for i in range(WORKERS_AT_WORK)]
        learner = asyncio.create_task(self._learner())
        async with asyncio.timeout(LIMIT_S):
            await asyncio.wait({learner, *workers}, return_when=asyncio.FIRST_EXCEPTION)
            await asyncio.gather(learner, *workers)

    def _start_outage(self) -> None:
        """Start an outage of the log, for all processes or for one."""
        now = self.loop.time()
        until = now + self.random.uniform(8.0, 60.0)
        if self.chance(0.3):
            self.silent[self.random.choice(self.lives)] = until
        elif self.silent[ALL] <= now:
            self.silent[ALL] = until
            self.checker.outages.append((now, until))
        self.loop.call_at(until, self.store.look_again)

    def _silent_until(self) -> float:
        return max(self.silent[ALL], self.silent.get(process_name.get(), 0.0))

    def _start_process(self, name: str) -> None:
        process_name.set(name)
        self.lives.append(name)

    async def _learner(self) -> None:
        actors: list[Actor] = []
        while self.checkpoints[-1].version < VERSIONS:
            self.writer += 1
            learner = Learner(self, self.checkpoints[-1], writer=self.writer, versions=VERSIONS)
            self._start_process(f"learner.{self.writer}")
            actor = Actor(self.loop, learner.live)
            actors.append(actor)
            replaced_after = None
            if self.deaths and self.chance(0.4):
                after = self.random.uniform(0.0, 60.0)
                if self.chance(0.7):
                    self.loop.call_later(after, actor.kill)
                else:
                    self.loop.call_later(after, actor.suspend, self.random.uniform(10.0, 90.0))
                    replaced_after = after + self.delay_s(60.0)
            await asyncio.wait({actor.ended}, timeout=replaced_after)
            if actor.ended.done():
                actor.ended.result()
                await asyncio.sleep(self.delay_s(90.0))
        await asyncio.gather(*(actor.ended for actor in actors))
        self.over = True
        for worker in self.at_work:
            worker.stop()

    async def _worker(self, name: str) -> None:
        lives = itertools.count()
        while not self.over:
            self._start_process(f"{name}.{next(lives)}")
            engine = Engine(self)
            worker = a_worker(self, name, engine)
            self.at_work.append(worker)
            self.engines[process_name.get()] = engine
            working = asyncio.create_task(worker.work())
            dies_after = self.random.uniform(0.0, 80.0) if self.deaths and self.chance(0.4) else None
            if self.deaths and self.chance(0.3):
                engine.dies_at = self.loop.time() + self.random.uniform(0.0, 80.0)
            death_signals = self.death_signals[process_name.get()] = self.loop.create_future()
            await asyncio.wait({working, death_signals}, timeout=dies_after, return_when=asyncio.FIRST_COMPLETED)
            self.at_work.remove(worker)
            del self.engines[process_name.get()]
            if death_signals.done():
                pass  # the worker died at a failpoint
            elif working.done() and isinstance(working.exception(), EngineDead):
                self.checker.engines_died += 1
            elif working.done():
                working.result()
                assert self.over, "the worker ended before the run"
            working.cancel()
            await asyncio.wait({working})
            await asyncio.sleep(self.delay_s(10.0))

    def _note(self, topic: str, records: Sequence[Record]) -> None:
        if self._copying:
            return
        by = process_name.get()
        replaced = by.startswith("learner") and by != f"learner.{self.writer}"
        self.checker.note(topic, records, by, at=self.loop.time(), replaced=replaced)
        if topic == CONTROL and self.outages and self.chance(0.3):  # most often around cuts
            self.loop.call_later(self.delay_s(5.0), self._start_outage)
        if topic == DEAD_LETTERS:
            raise AssertionError(f"dead-lettered: {records}")
        if topic in (CONTROL, TRAJECTORIES, OLD_LOGPROBS) and self.copies and self.chance(0.2):
            self.loop.call_later(self.delay_s(30.0), self._copy, topic, [Outgoing(r.key, r.body) for r in records])

    def _copy(self, topic: str, records: Sequence[Outgoing]) -> None:
        self._copying = True
        try:
            self.bus.publish(topic, records)
        except NotYet as wait:
            wait.subscribe(lambda: self._copy(topic, records))
        finally:
            self._copying = False

    def manifest(self, version: Version) -> Manifest:
        """Manifest of a version without weights."""
        return Manifest(
            schema=SCHEMA, run=RUN, writer=1, version=version, digest=str(version), encoding="base", object="",
            object_size=0, tensors=(), canaries=(CANARY,),
        )  # fmt: skip

    def reward(self) -> float:
        """Reward of a session."""
        return 0.5

    def _available(self, limit: int) -> int:
        """Number of records that a poll without waiting returns: often none, or only some."""
        return self.random.choice([0, 1, limit]) if self.hesitates else limit


def slow_polling(patch: pytest.MonkeyPatch) -> None:
    """Lengthen polling intervals, so that a run has few events, and shorten the hold limit, so that runs reach it."""
    for module, name, seconds in (
        (worker_module, "POLL_S", 5.0),
        (cut_responder, "ANSWER_S", 10.0),
        (worker_module, "KEEP_S", 6.0),
        (worker_module, "ALIVE_S", 5.0),
        (asking, "POLL_S", 1.0),
        (cut_responder, "HOLD_LIMIT_S", 15.0),
    ):
        patch.setattr(module, name, seconds)


def latency(chances: random.Random) -> Callable[[], float]:
    """Delays between a coroutine and its thread, seconds. Some schedules have a slow log."""
    usual = chances.choice([0.02, 0.02, 0.2])
    return lambda: usual * chances.random() if chances.random() < 0.95 else 4.0 * chances.random()
