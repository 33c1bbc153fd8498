"""The workers of simulated runs: real workers with a scripted engine, and fakes of gateway and store."""

import asyncio
import itertools
from collections.abc import Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NoReturn

from palimpsest.common.config.engines import ScriptedEngineConfig
from palimpsest.common.sessions.port import SessionFailed
from palimpsest.common.sessions.wire import CreateSession, Lease, Message, Session, Status, Step
from palimpsest.common.trajectory_limit import TrajectoryLimit
from palimpsest.common.versions import Version
from palimpsest.services.rollout.engine.late_start import LateStart
from palimpsest.services.rollout.engine.port import EngineDead, SampledTokens, StoredWeights
from palimpsest.services.rollout.engine.scripted import ScriptedEngine
from palimpsest.services.rollout.trajectory_sampler import Tally, TrajectorySampler
from palimpsest.services.rollout.weights import WeightSync
from palimpsest.services.rollout.worker import Worker
from tests.records.any_learner import any_control
from tests.simulation.cut_learner import RUN, SAMPLING

if TYPE_CHECKING:
    from tests.simulation.cut_schedules import Schedule

LONGEST_START_S = 60.0
"""Simulated seconds in which an engine starts."""
process_name: ContextVar[str] = ContextVar("process_name", default="learner")
"""Process that the present code belongs to: a worker's or learner's name and the number of the process."""


def a_worker(schedule: "Schedule", name: str, engine: "Engine") -> Worker:
    """A worker assembled as its process does, with a scripted engine and fakes of gateway and store."""
    port = LateStart(engine) if schedule.sleeps else engine
    weights = Fetching(
        port,
        schedule,  # type: ignore[arg-type]
        schedule.folder / name,
        tolerance=0.05,
        report=lambda applied: worker.report_update(applied),
    )
    sampler = TrajectorySampler(
        name,
        port,
        Sessions(schedule),  # type: ignore[arg-type]
        ChatRenderer(schedule),  # type: ignore[arg-type]
        2,
        Tally(),
        weights.wait_verified,
    )
    limit = TrajectoryLimit(SAMPLING.max_trajectory_tokens, "the test")
    worker = Worker(
        run=RUN, name=name, bus=schedule.bus, sampler=sampler, weights=weights, max_live=5, limit=limit,
        samples=2, evaluation_samples=2, versions=1, control=any_control(),
        sleeps=schedule.sleeps,
    )  # fmt: skip
    return worker


class Engine(ScriptedEngine):
    """Scripted engine with numbered tokens, random delays and deaths."""

    dies_at = float("inf")
    resident = False
    """Whether it has taken memory."""

    def __init__(self, schedule: "Schedule") -> None:
        config = ScriptedEngineConfig(kind="scripted", texts=("",), tokens_per_s=schedule.random.uniform(1.0, 6.0))
        super().__init__(config, encode=lambda _: self._numbered(schedule.random.randint(1, 4)))
        self._schedule, self._slow = schedule, schedule.chance(0.2)

    def _numbered(self, count: int) -> list[int]:
        return list(itertools.islice(self._schedule.numbers, count))

    def _alive(self) -> None:
        if self._schedule.loop.time() >= self.dies_at:
            raise EngineDead("the inference engine died")

    async def watch(self) -> NoReturn:
        if self.dies_at == float("inf"):
            return await super().watch()
        await asyncio.sleep(self.dies_at - self._schedule.loop.time() + self._schedule.delay_s(1.0))
        raise EngineDead("the inference engine died")

    def _sample(self, request: str, message: Any) -> None:
        self._alive()
        assert not self.asleep, "an engine samples in its sleep"
        super()._sample(request, message)
        place = len(message.versions) - 1
        now = self._schedule.loop.time()
        self._schedule.checker.sampled(message.script[place], process_name.get(), message.versions[place], at=now)

    async def start(self) -> None:
        self.resident = True
        await asyncio.sleep(self._schedule.delay_s(LONGEST_START_S))
        self._alive()

    async def pause(self) -> None:
        await asyncio.sleep(self._schedule.delay_s(8.0 if self._slow else 0.5))
        await super().pause()

    async def partial(self, request: str) -> SampledTokens | None:
        if self._schedule.chance(0.2):
            await asyncio.sleep(self._schedule.delay_s(1.0))
        return await super().partial(request)

    async def sleep(self) -> None:
        await asyncio.sleep(self._schedule.delay_s(1.0))
        await super().sleep()

    async def load(self, weights: StoredWeights) -> None:
        await asyncio.sleep(self._schedule.delay_s(1.0))
        self._alive()
        await super().load(weights)

    async def score(self, tokens: Sequence[int]) -> list[float]:
        await asyncio.sleep(self._schedule.delay_s(3.0))
        self._alive()
        return await super().score(tokens)


class Fetching(WeightSync):
    """Fetches versions without weights, after a delay."""

    async def _fetch(self, version: Version) -> StoredWeights:
        await asyncio.sleep(self._store.delay_s(5.0))  # type: ignore[attr-defined]
        path = self._folder / f"{version}.raw"
        path.touch()
        return StoredWeights(self._store.manifest(version), path)  # type: ignore[attr-defined]


class ChatRenderer:
    """Renders empty texts; stop tokens are numbered too."""

    def __init__(self, schedule: "Schedule") -> None:
        self._schedule = schedule

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        return (next(self._schedule.numbers),)

    def begin(self, messages: Sequence[Message], tools: Sequence[Any]) -> tuple[int, ...]:
        return (1, 2, 3)

    def render_turn_separator(self, messages: Sequence[Message], *, ended_by: int | None) -> tuple[int, ...]:
        return (4, 5)

    def text(self, tokens: Sequence[int]) -> str:
        return ""


class Sessions:
    """A gateway whose tools usually answer soon and sometimes fail."""

    def __init__(self, schedule: "Schedule") -> None:
        self._schedule = schedule

    async def create(self, wanted: CreateSession, *, idempotency_key: str, capacity_s: float) -> Session:
        await asyncio.sleep(self._schedule.delay_s(2.0))
        return Session(
            session_id=str(self._schedule.random.randint(1, 3)), lease_expires_in_s=600.0, messages=(), tools=(),
            next_step=0, initial_state_hash="", environment_version="1",
        )  # fmt: skip

    async def step(self, session_id: str, number: int, text: str) -> Step:
        """The session's id is its number of turns."""
        await asyncio.sleep(self._schedule.delay_s(25.0))
        if self._schedule.chance(0.05):
            raise SessionFailed("environment_raised", "no")
        if number + 1 < int(session_id):
            return Step(step=number, status=Status.RUNNING)
        return Step(step=number, status=Status.TERMINATED, reward=self._schedule.reward(), success=False)

    async def heartbeat(self, session_id: str) -> Lease:
        return Lease(lease_expires_in_s=600.0)

    async def finalize(self, session_id: str) -> Step:
        await asyncio.sleep(self._schedule.delay_s(5.0))
        return Step(step=0, status=Status.TRUNCATED, reward=self._schedule.reward(), success=False)
