"""Complete learners in simulated time: they die, pause or are stopped at a failpoint, and others replace them.

A learner consists of all parts that services/learner/coordinator.py assembles, over a log in memory and a real snapshot
store on a folder. Its model is a table, so training takes milliseconds. The workers are those of cut_worker.py. A
seed repeats a run exactly.
"""

import asyncio
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from palimpsest.common import failpoints
from palimpsest.common.bus.port import Outgoing, Record
from palimpsest.common.control.changes import Caller
from palimpsest.common.control.desk import ControlDesk
from palimpsest.common.control.errors import HttpError
from palimpsest.common.messages import CONTROL, OLD_LOGPROBS, TASKS, RunFinished, VersionPublished, decode
from palimpsest.common.snapshots.manifest import Manifest, unseal
from palimpsest.common.versions import Version
from palimpsest.services.learner import coordinator as leading, loop as looping, ownership
from palimpsest.services.learner.batch.batching import Row
from palimpsest.services.learner.control.build import build_control
from palimpsest.services.learner.control.run_control import RunControl
from palimpsest.services.learner.evaluation.evaluator import Evaluator
from palimpsest.services.learner.ingest import dead_letter_writer, trajectory_reader
from palimpsest.services.learner.old_logprobs.interruption.coordinator import CutCoordinator
from palimpsest.services.learner.publishing import background
from tests.runs.fencing import Things, stored
from tests.servers.direct_store import DirectStore
from tests.simulation.cut_schedules import Schedule
from tests.simulation.cut_worker import process_name
from tests.simulation.learner_faults import ANYWHERE, FIRST_SAMPLED, VOCABULARY, Fault, FaultKind, configured
from tests.simulation.learner_process import LearnerThread, Log, NoWatch, SimulatedLearner
from tests.simulation.score_checker import ScoreChecker
from tests.simulation.simulated_time import Killed

PERSON = Caller("a person", "operator", "127.0.0.1")


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
    ranks: int = 1
    """Of each learner."""
    replaced: dict[int, Things] = field(default_factory=dict)
    """Learner -> versions and checkpoints that it had stored when it was replaced."""
    trained: list[tuple[int, Version, Row]] = field(default_factory=list)
    """Learner, its version, and each row of its training."""
    visits: "Counter[tuple[str, str]]" = field(default_factory=Counter)
    announced: set[Version] = field(default_factory=set)
    """Versions that a message on the log may name."""
    dead: set[str] = field(default_factory=set)
    """Worker processes that died at a failpoint. While their coroutines unwind, the log refuses their calls at once."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.checker = NullChecker()
        self.numbers = itertools.cycle(range(FIRST_SAMPLED, VOCABULARY))  # type: ignore[assignment]
        self.config = configured(self.folder)
        self.sleeps = self.config.rollout.engine.sleep
        self.alive: dict[str, SimulatedLearner] = {}

    def manifest(self, version: Version) -> Manifest:
        return unseal((self.home / "snapshots" / "versions" / f"{version:08d}.json").read_bytes())

    def _note(self, topic: str, records: Sequence[Record]) -> None:
        super()._note(topic, records)
        if topic not in (CONTROL, TASKS, OLD_LOGPROBS):
            return
        for message in (decode(topic, record.body) for record in records):
            if isinstance(message, VersionPublished):
                self.announced.add(message.version)
            elif (named := getattr(message, "version", None)) is not None:
                assert named in self.announced, f"{type(message).__name__} names version {named} before it is announced"
            if isinstance(message, RunFinished):
                self.over = True  # workers end after RunFinished

    def _copy(self, topic: str, records: Sequence[Outgoing]) -> None:
        if topic != CONTROL:  # a check needs the order of the learners' messages
            super()._copy(topic, records)

    def starts(self) -> None:
        """A rank of a learner has loaded its model."""

    def computes(self, what: str) -> None:
        """A rank of a learner is about to compute: it scores or trains."""

    @property
    def has_operator(self) -> bool:
        """Whether a person asks for cuts and checkpoints during the run."""
        return self.config.learner.publishing == "background"

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
            if self.has_operator:
                self._request_change(one)
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

    def _request_change(self, one: SimulatedLearner) -> None:
        """Now and then, a person asks the learner for a checkpoint or a cut."""
        if one.ended.done() or self.over:
            return
        if one.desk is not None and not one.still.done():
            with suppress(HttpError):  # it ends
                one.desk.submit(self.random.choice(["checkpoint", "cut"]), {}, PERSON, applies_from="now")
        self.loop.call_later(self.random.uniform(5.0, 40.0), self._request_change, one)

    def checked(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """A method of the cut coordinator that gets the resident version and its digest, which scores carry."""

        def call(coordinator: CutCoordinator, now: Version, digest: str, **options: Any) -> Any:
            assert now in self.announced, f"version {now} is not announced"
            assert self.manifest(now).digest == digest, f"another digest than that of version {now}"
            return method(coordinator, now, digest, **options)

        return call

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


@contextmanager
def simulated(schedule: LearnerSchedule) -> Iterator[None]:
    """Patch the learner's modules to use the parts and the clock of this schedule."""
    clock = SimpleNamespace(monotonic=schedule.loop.time, time=schedule.loop.time)

    def here() -> SimulatedLearner:
        return schedule.alive[process_name.get()]

    def controlled(*arguments: Any) -> tuple[ControlDesk, RunControl]:
        here().desk, _ = found = build_control(*arguments)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(leading, "open_bus", lambda _: Log(here()))
        patch.setattr(leading, "build_control", controlled)
        patch.setattr(background, "Thread", lambda **options: LearnerThread(here(), **options))
        patch.setattr(leading, "WorkerWatch", NoWatch)
        patch.setattr(looping, "time", clock)
        patch.setattr(ownership, "time", clock)
        patch.setattr(looping, "POLL_S", 2.0)
        patch.setattr(trajectory_reader, "time", clock)
        patch.setattr(dead_letter_writer, "time", clock)
        patch.setitem(CutCoordinator.__init__.__kwdefaults__, "clock", schedule.loop.time)
        patch.setitem(ControlDesk.__init__.__kwdefaults__, "clock", schedule.loop.time)
        patch.setitem(Evaluator.__init__.__kwdefaults__, "clock", schedule.loop.time)
        patch.setattr(failpoints, "reach", schedule.reach)
        for name in ("work", "cut"):
            patch.setattr(CutCoordinator, name, schedule.checked(getattr(CutCoordinator, name)))
        yield
