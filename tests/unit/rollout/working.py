"""A running rollout worker with a real log, store, and gateway, and a scripted engine that the test controls."""

import asyncio
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, NoReturn

from palimpsest.common.bus.port import Outgoing
from palimpsest.common.bus.sqlite import SqliteBus
from palimpsest.common.config.engines import ScriptedEngineConfig
from palimpsest.common.evaluation.tasks import evaluation_group
from palimpsest.common.messages import (
    CONTROL,
    DEAD_LETTERS,
    TASKS,
    TRAJECTORIES,
    WORKERS,
    GroupOffered,
    RunFinished,
    Sampling,
    TrajectoryFinished,
    VersionPublished,
    decode,
    encode,
    group_id,
)
from palimpsest.common.sessions.client import SessionClient
from palimpsest.common.snapshots.client import SnapshotClient
from palimpsest.common.snapshots.control_check import ControlCheck
from palimpsest.common.snapshots.manifest import Canary
from palimpsest.common.trajectory_limit import TrajectoryLimit
from palimpsest.common.versions import Version
from palimpsest.services.rollout.chat_renderer import ChatRenderer
from palimpsest.services.rollout.engine.port import EngineDead, SampledTokens, StoredWeights
from palimpsest.services.rollout.engine.scripted import ScriptedEngine
from palimpsest.services.rollout.trajectory_sampler import Tally, TrajectorySampler
from palimpsest.services.rollout.weights import UpdateResult, WeightSync
from palimpsest.services.rollout.worker import GROUP, Worker
from tests.processes.waiting import LIMIT_S
from tests.records.builders import SAMPLING

RUN = "test"
MOST_SAMPLES = 1_000
"""Most trajectories of a group."""
VERSIONS = 30
"""Of the run."""
CANARY = Canary((1, 2, 3), (1, 2), (-1.0, -2.0), previous=())


class GatedEngine(ScriptedEngine):
    """The scripted engine; requests of shut trajectories and scoring wait."""

    def __init__(self, dialogue: ChatRenderer) -> None:
        config = ScriptedEngineConfig(kind="scripted", texts=("3",), tokens_per_s=1e6)
        super().__init__(config, encode=dialogue.encode)
        self.asked: list[str] = []
        """Trajectories of the requests, in order."""
        self.live = self.most = 0
        """Number of running requests, and its maximum so far."""
        self.loaded: list[Version] = []
        self.failure: BaseException | None = None
        """Raised in place of an answer."""
        self.scoring = asyncio.Event()
        self.scoring.set()
        self._shut: Callable[[str], bool] = lambda _: False
        self._opened, self._gone = asyncio.Event(), asyncio.Event()

    def shut(self, holds: Callable[[str], bool] = lambda _: True) -> None:
        """Make requests of these trajectories wait."""
        self._shut = holds

    def open(self) -> None:
        """Release all waiting requests."""
        self._shut = lambda _: False
        self._opened.set()

    def die(self) -> None:
        """Fail as an engine whose process is killed; waiting requests raise EngineDead."""
        self.failure = EngineDead("the inference engine died of SIGKILL")
        self._gone.set()
        self.open()

    async def watch(self) -> NoReturn:
        await self._gone.wait()
        raise EngineDead("the inference engine died of SIGKILL")

    async def generate(
        self, prompt: Sequence[int], *, request: str, temperature: float, max_tokens: int, stop: Sequence[int]
    ) -> SampledTokens:
        trajectory = request.partition("#")[0]
        self.asked.append(trajectory)
        self.live += 1
        self.most = max(self.most, self.live)
        try:
            if self._shut(trajectory):
                await self._opened.wait()
            if self.failure is not None:
                raise self.failure
            return await super().generate(
                prompt, request=request, temperature=temperature, max_tokens=max_tokens, stop=stop
            )
        finally:
            self.live -= 1

    async def load(self, weights: StoredWeights) -> None:
        await super().load(weights)
        self.loaded.append(weights.manifest.version)

    async def score(self, tokens: Sequence[int]) -> list[float]:
        await self.scoring.wait()
        return await super().score(tokens)


class KnownWaits(WeightSync):
    """A WeightSync that records the versions for which the worker waits."""

    awaited: frozenset[Version] = frozenset()

    async def wait_verified(self, version: Version) -> None:
        self.awaited |= {version}
        await super().wait_verified(version)

    async def wait_unless_evaluating(self, version: Version) -> bool:
        self.awaited |= {version}
        return await super().wait_unless_evaluating(version)


@dataclass(frozen=True)
class Place:
    """Services around a worker."""

    folder: Path
    bus: SqliteBus
    store: SnapshotClient
    gateway: str
    dialogue: ChatRenderer


@dataclass(frozen=True)
class Working:
    """A running worker."""

    worker: Worker
    engine: GatedEngine
    weights: KnownWaits
    reports: list[UpdateResult]
    """Results of its updates so far."""
    ending: "asyncio.Task[None]"

    async def until(self, holds: Callable[[], bool]) -> None:
        """Poll until the condition holds; raises AssertionError if the worker ends first."""
        deadline = time.monotonic() + LIMIT_S
        while not holds():
            if self.ending.done():
                self.ending.result()
                raise AssertionError("the worker ended before the condition held")
            assert time.monotonic() < deadline, "the condition did not hold in time"
            await asyncio.sleep(0.005)

    async def ends(self) -> None:
        """Wait until the worker has ended; raises its error."""
        async with asyncio.timeout(LIMIT_S):
            await asyncio.wait({self.ending})
        self.ending.result()

    async def looked(self, times: int = 3) -> None:
        """Wait until a paused worker has read the log to its end this many times, or the cut is over."""
        interruption, left = self.worker._interruption, times
        note_end_of_log = interruption.note_end_of_log

        def count() -> None:
            nonlocal left
            note_end_of_log()
            left -= 1

        interruption.note_end_of_log = count  # type: ignore[method-assign]
        await self.until(lambda: left <= 0 or interruption.cut is None)
        interruption.note_end_of_log = note_end_of_log  # type: ignore[method-assign]


async def turns(count: int = 200) -> None:
    """Yield to the event loop this many times, so that every ready task runs."""
    for _ in range(count):
        await asyncio.sleep(0)


@asynccontextmanager
async def working(
    place: Place, *, engine: GatedEngine | None = None, bus: SqliteBus | None = None, name: str = "worker-0",
    max_live: int = 8, control: ControlCheck | None = None, hold_s: float | None = None,
) -> AsyncIterator[Working]:  # fmt: skip
    """Run a worker inside the block; it is killed at the end of the block if it has not stopped."""
    engine, bus = engine or GatedEngine(place.dialogue), bus or place.bus
    async with SessionClient(place.gateway, timeout_s=LIMIT_S, connections=100) as sessions:
        folder = Path(mkdtemp(dir=place.folder))  # threads of a cancelled worker may still write here
        reports: list[UpdateResult] = []

        def report(applied: UpdateResult) -> None:
            worker.report_update(applied)
            reports.append(applied)

        weights = KnownWaits(engine, place.store, folder, tolerance=0.05, report=report)
        sampler = TrajectorySampler(name, engine, sessions, place.dialogue, 2, Tally(), weights.wait_verified)
        limit = TrajectoryLimit(SAMPLING.max_trajectory_tokens, "the test")
        worker = Worker(
            run=RUN, name=name, bus=bus, sampler=sampler, weights=weights, max_live=max_live, limit=limit,
            samples=MOST_SAMPLES, evaluation_samples=2, versions=VERSIONS, control=control or ControlCheck(place.store),
            hold_s=hold_s,
        )  # fmt: skip
        ending = asyncio.create_task(worker.work())
        try:
            yield Working(worker, engine, weights, reports, ending)
        finally:
            ending.cancel()
            await asyncio.gather(ending, return_exceptions=True)


def opened_bus(path: Path, *, partitions: int = 1, lease_s: float = 10.0) -> SqliteBus:
    """A log with all topics; with one partition of tasks, one offset is the commit."""
    bus = SqliteBus(path, lease_s=lease_s)
    bus.create_topics({TASKS: partitions, TRAJECTORIES: 2, CONTROL: 1, WORKERS: 1, DEAD_LETTERS: 1})
    return bus


def offer(
    bus: SqliteBus, *indexes: int, version: int = 0, samples: int = 2, run: str = RUN, environment: str = "lookup",
    sampling: Sampling = SAMPLING, writer: int = 1, evaluation: bool = False,
) -> None:  # fmt: skip
    """Publish groups on the task topic."""
    for index in indexes:
        name = evaluation_group(Version(version), index) if evaluation else group_id(index)
        group = GroupOffered(
            run=run, group=name, index=index, version=Version(version), environment=environment,
            task_seed=index, samples=samples, sampling=sampling, time_limit_s=600.0,
            writer=writer, evaluation=evaluation,
        )  # fmt: skip
        bus.publish(TASKS, [Outgoing(group.group, encode(group))])


def announce(bus: SqliteBus, version: int, *, run: str = RUN) -> None:
    """Publish that a version is in the store."""
    published = VersionPublished(run=run, version=Version(version), digest="", published_at=0.0, writer=1)
    bus.publish(CONTROL, [Outgoing(run, encode(published))])


def finish(bus: SqliteBus, *, run: str = RUN, versions: int = 0) -> None:
    """Publish the end of the run after this number of versions."""
    end = RunFinished(run=run, version=Version(0), writer=1, versions=versions)
    bus.publish(CONTROL, [Outgoing(run, encode(end))])


def messages(bus: SqliteBus, topic: str) -> list[Any]:
    """Return all records of a topic, decoded."""
    found: list[Any] = []
    with bus.consumer(topic) as consumer:
        while records := consumer.poll(limit=1000, timeout_s=0):
            found += [decode(topic, record.body) for record in records]
    return found


def finished(bus: SqliteBus) -> list[str]:
    """Return the sorted ids of finished trajectories on the log, with repeats."""
    return sorted(m.trajectory for m in messages(bus, TRAJECTORIES) if isinstance(m, TrajectoryFinished))


def ids(*indexes: int, samples: Iterable[int] = (0, 1)) -> list[str]:
    """Return the trajectory ids of these groups."""
    return [f"{group_id(index)}/{sample}" for index in indexes for sample in samples]


def committed(bus: SqliteBus) -> int:
    """Return the committed task offset of the workers' group."""
    with closing(sqlite3.connect(bus.path)) as db:
        row = db.execute("SELECT offset FROM commits WHERE topic = ? AND grp = ?", (TASKS, GROUP)).fetchone()
    return int(row[0]) if row else 0


def heard(bus: SqliteBus, name: str) -> float:
    """Return the time of the member's last heartbeat in the workers' group; 0 if it is no member."""
    with closing(sqlite3.connect(bus.path)) as db:
        row = db.execute("SELECT heard FROM member_leases WHERE grp = ? AND member = ?", (GROUP, name)).fetchone()
    return float(row[0]) if row else 0.0
