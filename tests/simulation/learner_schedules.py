"""Complete learners in simulated time: they die, pause or are stopped at a failpoint, and others replace them.

A learner consists of all parts that services/learner/coordinator.py assembles, over a log in memory and a real snapshot
store on a folder. Its model is a table, so training takes milliseconds. The workers are those of cut_worker.py. A
seed repeats a run exactly.
"""

import asyncio
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from palimpsest.common import failpoints
from palimpsest.common.bus.port import Outgoing, Position, Record
from palimpsest.common.messages import CONTROL, RunFinished, decode
from palimpsest.common.service import Starting, Stop
from palimpsest.common.snapshots.client import SnapshotClient
from palimpsest.common.snapshots.fencing import Fenced
from palimpsest.common.snapshots.manifest import Manifest, unseal
from palimpsest.common.versions import Version
from palimpsest.services.learner import coordinator as leading, instruments, loop as looping
from palimpsest.services.learner.batch.batching import Row
from palimpsest.services.learner.coordinator import run_coordinator
from palimpsest.services.learner.distributed import ProcessGroup
from palimpsest.services.learner.evaluation.evaluator import Evaluator
from palimpsest.services.learner.ingest import dead_letter_writer, trajectory_reader
from palimpsest.services.learner.loop_parts import Training
from palimpsest.services.learner.model.trainable import TrainablePolicy
from palimpsest.services.learner.old_logprobs.distributed_scorer import model_scorer
from palimpsest.services.learner.old_logprobs.interruption.coordinator import CutCoordinator
from palimpsest.services.learner.training.build import build_training_state
from palimpsest.services.learner.training.results import StepResult
from palimpsest.services.learner.training.trainer import Trainer
from tests.runs.fencing import Things, stored
from tests.servers.direct_store import URL, DirectStore
from tests.simulation.cut_schedules import Schedule
from tests.simulation.cut_worker import process_name
from tests.simulation.learner_faults import ANYWHERE, FIRST_SAMPLED, VOCABULARY, Fault, FaultKind, Table, configured
from tests.simulation.memory_bus import MemoryBus
from tests.simulation.score_checker import ScoreChecker
from tests.simulation.simulated_time import Actor, Killed

FOREVER_S = 1e7


class NullChecker(ScoreChecker):
    """Records nothing: learner_checks.py checks the folder of the run instead."""

    def note(self, *_: Any, **__: Any) -> None: ...
    def sampled(self, *_: Any, **__: Any) -> None: ...


@dataclass
class LearnerSchedule(Schedule):
    """One run; `plan`: faults of successive learners, later ones have none; `of_worker`: fault of the first worker that
    reaches its place."""

    plan: list[Fault] = field(default_factory=list)
    of_worker: Fault | None = None
    home: Path = Path()
    stored: DirectStore = None  # type: ignore[assignment]
    replaced: dict[int, Things] = field(default_factory=dict)
    """Learner -> versions and checkpoints that it had stored when it was replaced."""
    trained: list[tuple[int, Version, Row]] = field(default_factory=list)
    """Learner, its version, and each row of its training."""
    visits: "Counter[tuple[str, str]]" = field(default_factory=Counter)
    dead: set[str] = field(default_factory=set)
    """Worker processes that died at a failpoint. While their coroutines unwind, the log refuses their calls at once."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.checker = NullChecker()
        self.numbers = itertools.cycle(range(FIRST_SAMPLED, VOCABULARY))  # type: ignore[assignment]
        self.config = configured(self.folder)
        self.alive: dict[str, SimulatedLearner] = {}

    def manifest(self, version: Version) -> Manifest:
        return unseal((self.home / "snapshots" / "versions" / f"{version:08d}.json").read_bytes())

    def _note(self, topic: str, records: Sequence[Record]) -> None:
        super()._note(topic, records)
        if topic == CONTROL and any(isinstance(decode(topic, record.body), RunFinished) for record in records):
            self.over = True  # workers end after RunFinished

    def _copy(self, topic: str, records: Sequence[Outgoing]) -> None:
        if topic != CONTROL:  # a check needs the order of the learners' messages
            super()._copy(topic, records)

    def reward(self) -> float:
        return self.random.choice([0.0, 1.0])

    def _silent_until(self) -> float:
        if process_name.get() in self.dead:
            raise Killed
        return super()._silent_until()

    async def _learner(self) -> None:
        ended = []
        while not any(one.finished for one in self.alive.values()):
            self.writer += 1
            fault = self.plan[self.writer - 1] if self.writer <= len(self.plan) else None
            self._start_process(f"learner.{self.writer}")
            one = self.alive[process_name.get()] = SimulatedLearner(self, self.writer, fault)
            one.begin()
            ended.append(one.ended)
            if fault is not None and fault.place == ANYWHERE:
                self.loop.call_later(self.random.uniform(0.0, 150.0), one.kill)
            await asyncio.wait({one.ended, one.still}, return_when=asyncio.FIRST_COMPLETED)
            if one.ended.done():
                one.ended.result()
            else:
                self.replaced[one.writer] = stored(self.home, one.writer)
            await asyncio.sleep(self.delay_s(20.0))
            if not one.ended.done():  # it wakes after its successor has begun
                self.loop.call_later(self.random.uniform(10.0, 150.0), one.wake)
        await asyncio.gather(*ended)
        self.over = True
        for worker in self.at_work:
            worker.stop()

    def reach(self, place: str) -> None:
        """Called at every failpoint: apply the fault of the present process, if its place and visit match."""
        name = process_name.get()
        self.visits[name, place] += 1
        one = self.alive.get(name)
        fault = one.fault if one is not None else self.of_worker
        if fault is None or fault.happened or (place, self.visits[name, place]) != (fault.place, fault.visit):
            return
        fault.happened = True
        if one is not None:
            one.apply(fault.kind)
        elif fault.kind is FaultKind.DIE:
            self.dead.add(name)
            self.death_signals[name].set_result(None)
            raise asyncio.CancelledError
        else:
            self.silent[name] = self.loop.time() + self.random.uniform(10.0, 40.0)
            self.loop.call_at(self.silent[name], self.store.look_again)


class SimulatedLearner:
    """One learner process."""

    def __init__(self, schedule: LearnerSchedule, writer: int, fault: Fault | None) -> None:
        self.schedule, self.writer, self.fault = schedule, writer, fault
        self.stop, self.finished = Stop(), False
        self.still: asyncio.Future[None] = schedule.loop.create_future()
        """Done when the learner pauses."""
        self._dead = False
        self._waking: list[Callable[[], None]] = []

    def begin(self) -> None:
        """Start the process; `ended` raises its unexpected errors."""
        self._actor = Actor(self.schedule.loop, self._live)
        self.ended = self._actor.ended

    def apply(self, kind: FaultKind) -> None:
        """On the learner's thread: die, pause until `wake`, or stop."""
        if kind is FaultKind.DIE:
            self._dead = True
            raise Killed
        if kind is FaultKind.STOP:
            self.stop.request()
            return
        self.schedule.loop.call_soon(self.still.set_result, None)
        self._actor.sleep(FOREVER_S, self._waking.append)

    def wake(self) -> None:
        """Resume after a pause."""
        for callback in self._waking:
            callback()

    def kill(self) -> None:
        """Kill the process at its present wait, unless it has ended or the run is over."""
        if not (self.ended.done() or self.schedule.over):
            assert self.fault is not None
            self.fault.happened = self._dead = True
            self._actor.kill()

    def pause(self) -> None:
        """Delay a call to another process. A dead process makes no calls."""
        if self._dead:
            raise Killed
        if self.schedule.chance(0.3):
            self._actor.sleep(self.schedule.delay_s(1.0))

    def _live(self) -> None:
        config = self.schedule.config
        ranks, model = ProcessGroup(), Table()
        policy = TrainablePolicy(model, config.learner.optimizer)
        with Store(self) as store:
            state = build_training_state(
                config.learner, policy, store, ranks.device, on_load=lambda _: instruments.SNAPSHOT_LOADS.inc()
            )
            trainer = WatchedTrainer(policy, state, ranks, config.learner, length=60, seed=config.run.seed)
            trainer.learner = self
            try:
                training = Training(trainer, policy, state, ranks)
                run_coordinator(config, self.stop, store, training, model_scorer(model, ranks.device), NoServer())
            except Fenced:
                assert self.still.done(), "the learner was replaced without a pause"
            else:
                assert self.writer == self.schedule.writer, "the learner was replaced but trained to the end"
                self.finished = not self.stop.requested


class WatchedTrainer(Trainer):
    """Records all rows of training for the checks."""

    learner: SimulatedLearner

    def train(self, minibatches: Sequence[Sequence[Row]], now: Version, **options: Any) -> StepResult:
        """See Trainer."""
        trained = self.learner.schedule.trained
        trained += [(self.learner.writer, now, row) for minibatch in minibatches for row in minibatch]
        return super().train(minibatches, now, **options)


class Log(MemoryBus):
    """Bus of a learner that may die before its records are on the log, or before publish returns."""

    def __init__(self, one: SimulatedLearner) -> None:
        super().__init__(one.schedule.store)
        self._learner = one

    def publish(self, topic: str, records: Sequence[Outgoing]) -> list[Position]:
        """See Bus."""
        self._learner.pause()
        positions = super().publish(topic, records)
        self._learner.pause()
        return positions


class NoWatch:
    """Replaces the page's watch of the workers, whose thread is not simulated."""

    def __init__(self, *_: object, **__: object) -> None: ...
    def start(self) -> None:
        """See WorkerWatch."""

    def close(self) -> None:
        """See WorkerWatch."""


class NoServer(Starting):
    """Replaces the learner's HTTP server; no client needs it."""

    def __init__(self) -> None:
        self.doing = ""

    def show_service(self, **_options: object) -> None:
        """See Starting."""


class Store(SnapshotClient):
    """Client of the store, for a learner that may die before or after a request."""

    def __init__(self, one: SimulatedLearner) -> None:
        super().__init__(URL)
        one.schedule.stored.connect(self)
        self._learner = one

    def put(self, *arguments: Any, **options: Any) -> Manifest:
        """See SnapshotClient."""
        self._learner.pause()
        manifest = super().put(*arguments, **options)
        self._learner.pause()
        return manifest

    def request(self, method: str, path: str, body: Any = None) -> Any:
        """See SnapshotClient."""
        self._learner.pause()
        answer = super().request(method, path, body)
        if method != "GET":  # no delay between the confirmation of the lease and the write
            self._learner.pause()
        return answer


@contextmanager
def simulated(schedule: LearnerSchedule) -> Iterator[None]:
    """Patch the learner's modules to use the parts and the clock of this schedule."""
    clock = SimpleNamespace(monotonic=schedule.loop.time, time=schedule.loop.time)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(leading, "open_bus", lambda _: Log(schedule.alive[process_name.get()]))
        patch.setattr(leading, "WorkerWatch", NoWatch)
        patch.setattr(looping, "time", clock)
        patch.setattr(looping, "POLL_S", 2.0)
        patch.setattr(trajectory_reader, "time", clock)
        patch.setattr(dead_letter_writer, "time", clock)
        patch.setitem(CutCoordinator.__init__.__kwdefaults__, "clock", schedule.loop.time)
        patch.setitem(Evaluator.__init__.__kwdefaults__, "clock", schedule.loop.time)
        patch.setattr(failpoints, "reach", schedule.reach)
        yield
