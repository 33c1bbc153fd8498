"""A learner process in simulated time: all its parts, its threads, and its connections to the log and the store."""

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from palimpsest.common.arrays import Float32Array
from palimpsest.common.bus.port import Outgoing, Position
from palimpsest.common.control.desk import ControlDesk
from palimpsest.common.service import Starting, Stop
from palimpsest.common.snapshots.client import SnapshotClient
from palimpsest.common.snapshots.fencing import Fenced
from palimpsest.common.snapshots.manifest import Manifest
from palimpsest.common.versions import Version
from palimpsest.services.learner import instruments
from palimpsest.services.learner.batch.batching import PaddedBatch, Row
from palimpsest.services.learner.coordinator import run_coordinator
from palimpsest.services.learner.distributed import ProcessGroup
from palimpsest.services.learner.loop_parts import Training
from palimpsest.services.learner.model.trainable import TrainablePolicy
from palimpsest.services.learner.old_logprobs.distributed_scorer import Pass, model_scorer
from palimpsest.services.learner.training.build import build_training_state
from palimpsest.services.learner.training.follower import run_follower
from palimpsest.services.learner.training.results import StepResult
from palimpsest.services.learner.training.trainer import Trainer
from tests.servers.direct_store import URL
from tests.simulation.learner_faults import Fault, FaultKind, Table
from tests.simulation.memory_bus import MemoryBus
from tests.simulation.simulated_ranks import Meeting, SimulatedRank, own_rank
from tests.simulation.simulated_time import Actor, Killed

if TYPE_CHECKING:
    from tests.simulation.learner_schedules import LearnerSchedule

FOREVER_S = 1e7
LATE_S = 30.0
"""Longest time until a thread begins, in simulated seconds."""


class SimulatedLearner:
    """One learner process."""

    def __init__(self, schedule: "LearnerSchedule", writer: int, fault: Fault | None) -> None:
        self.schedule, self.writer, self.fault = schedule, writer, fault
        self.stop, self.finished = Stop(), False
        self.still: asyncio.Future[None] = schedule.loop.create_future()
        """Done when the learner pauses."""
        self.dead = False
        self.desk: ControlDesk | None = None
        self.threads: list[Actor] = []
        self._waking: list[Callable[[], None]] = []

    def begin(self) -> None:
        """Start the process; `ended` raises its unexpected errors."""
        self._meeting = Meeting(self.schedule.ranks, self.pause)
        self._actor = Actor(self.schedule.loop, self._live)
        self.threads += [
            Actor(self.schedule.loop, partial(self._follow, rank)) for rank in range(1, self.schedule.ranks)
        ]
        self.ended = self._actor.ended
        self.ended.add_done_callback(lambda _: self._end_threads())

    def apply(self, kind: FaultKind) -> None:
        """On a thread of the learner: die, pause until `wake`, or stop."""
        here = Actor.here.actor
        if kind is FaultKind.DIE:
            self.dead = True
            if here is not self._actor:
                self.schedule.loop.call_soon(self._actor.kill)
            raise Killed
        if kind is FaultKind.STOP:
            self.stop.request()
            return
        self.schedule.loop.call_soon(self.still.set_result, None)
        for other in (self._actor, *self.threads):
            if other is not here and not other.ended.done():
                other.suspend(FOREVER_S)
                self._waking.append(other.resume)
        here.sleep(FOREVER_S, self._waking.append)

    def wake(self) -> None:
        """Resume after a pause."""
        for callback in self._waking:
            callback()

    def kill(self) -> None:
        """Kill the process at its present wait, unless it has ended or the run is over."""
        if not (self.ended.done() or self.schedule.over):
            assert self.fault is not None
            self.fault.happened = self.dead = True
            self._actor.kill()

    def _end_threads(self) -> None:
        """The process has ended."""
        self.dead = True
        for thread in self.threads:
            thread.kill()

    def pause(self) -> None:
        """Delay a call to another process. A dead process makes no calls."""
        if self.dead:
            raise Killed
        if self.schedule.chance(0.3):
            Actor.here.actor.sleep(self.schedule.delay_s(1.0))

    def watched(self, score: Pass) -> Pass:
        """Scores that the schedule hears of."""

        def watched(batch: PaddedBatch) -> Float32Array:
            self.schedule.computes("scores")
            return score(batch)

        return watched

    def _rank(self, rank: int, store: SnapshotClient) -> tuple[Training, Pass]:
        """What a rank trains and scores with."""
        config, model = self.schedule.config, Table()
        own_rank.set(rank)
        ranks = SimulatedRank(self._meeting, rank) if self.schedule.ranks > 1 else ProcessGroup()
        policy = TrainablePolicy(model, config.learner.optimizer)
        state = build_training_state(
            config.learner, policy, store, ranks.device, on_load=lambda _: instruments.SNAPSHOT_LOADS.inc()
        )
        trainer = WatchedTrainer(policy, state, ranks, config.learner, length=60, seed=config.run.seed)
        trainer.learner = self
        self.schedule.starts()
        return Training(trainer, policy, state, ranks), self.watched(model_scorer(model, ranks.device))

    def _follow(self, rank: int) -> None:
        with Store(self) as store:
            try:
                training, score = self._rank(rank, store)
                run_follower(training.policy, training.state, training.trainer, training.ranks, score)
            except Exception as error:
                self._meeting.fail(error)

    def _live(self) -> None:
        config = self.schedule.config
        with Store(self) as store:
            training, score = self._rank(0, store)
            try:
                run_coordinator(config, self.stop, store, training, score, NoServer())
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
        self.learner.schedule.computes("trains")
        if not own_rank.get():
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


class LearnerThread:
    """Replaces a thread that a learner starts: it begins late, and ends with its process."""

    def __init__(self, one: SimulatedLearner, *, target: Callable[..., None], args: Sequence[Any], **_: Any) -> None:
        self._one, self._work = one, partial(target, *args)

    def start(self) -> None:
        """See threading.Thread."""
        self._actor = Actor(self._one.schedule.loop, self._live)
        self._one.threads.append(self._actor)

    def is_alive(self) -> bool:
        """See threading.Thread."""
        return not self._actor.ended.done()

    def join(self, timeout: float | None = None) -> None:
        """See threading.Thread."""
        if self._one.dead:
            raise Killed
        if self.is_alive():
            ended = self._actor.ended
            Actor.here.actor.sleep(
                FOREVER_S if timeout is None else timeout, lambda wake: ended.add_done_callback(lambda _: wake())
            )

    def _live(self) -> None:
        Actor.here.actor.sleep(self._one.schedule.delay_s(LATE_S))
        self._work()


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
