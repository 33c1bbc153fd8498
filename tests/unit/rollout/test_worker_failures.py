"""A worker ends at a permanent error or with a dead engine, and drops no trajectory."""

import random
from contextlib import suppress
from typing import Any

import pytest

from palimpsest.common.messages import (
    TRAJECTORIES,
    TrajectoryDropped,
    TrajectoryFinished,
)
from palimpsest.services.rollout.chat_renderer import ChatRenderer
from palimpsest.services.rollout.engine.port import EngineDead, EngineFailed, SampledTokens
from palimpsest.services.rollout.engine.scripted import ScriptedEngine
from palimpsest.services.rollout.trajectory_builder import Contradiction
from tests.unit.rollout.working import (
    GatedEngine,
    Place,
    announce,
    committed,
    finished,
    ids,
    messages,
    offer,
    working,
)


@pytest.mark.parametrize("moment", ["at work", "while it drains"])
async def test_a_permanent_error_ends_the_worker(place: Place, moment: str) -> None:
    offer(place.bus, 0)
    announce(place.bus, 0)
    async with working(place) as running:
        running.engine.shut()
        running.engine.failure = RuntimeError("a bug")
        await running.until(lambda: sorted(running.engine.asked) == ids(0))
        if moment == "while it drains":
            running.worker.stop()
            await running.until(lambda: running.worker.waiting_for() == "trajectories in flight, before it stops")
        running.engine.open()
        with pytest.raises(RuntimeError, match="a bug"):
            await running.ends()
    assert (committed(place.bus), messages(place.bus, TRAJECTORIES)) == (0, [])


async def test_a_dead_engine_ends_the_worker_and_drops_nothing(place: Place) -> None:
    offer(place.bus, 0, 1)
    announce(place.bus, 0)
    async with working(place) as running:
        running.engine.shut()
        await running.until(lambda: sorted(running.engine.asked) == ids(0, 1))
        running.engine.die()
        with pytest.raises(EngineDead, match="died of SIGKILL"):
            await running.ends()
    assert (committed(place.bus), messages(place.bus, TRAJECTORIES)) == (0, [])
    async with working(place) as again:
        await again.until(lambda: committed(place.bus) == 2)
    assert finished(place.bus) == ids(0, 1)


async def test_a_dead_engine_is_detected_while_idle(place: Place) -> None:
    announce(place.bus, 0)
    async with working(place) as running:
        await running.until(lambda: running.worker.waiting_for() == "tasks")
        running.engine.die()
        with pytest.raises(EngineDead, match="died of SIGKILL"):
            await running.ends()


class DiesAfter(GatedEngine):
    """An engine whose process is killed after it has begun this many messages."""

    def __init__(self, dialogue: ChatRenderer, messages: int) -> None:
        super().__init__(dialogue)
        self._left = messages

    async def generate(self, *args: Any, **options: Any) -> SampledTokens:
        self._left -= 1
        if self._left == 0:
            self.die()
        return await super().generate(*args, **options)


async def run_through_deaths(place: Place, chances: random.Random, groups: int) -> int:
    """Run workers in turn, each with an engine that dies at a random moment, until all tasks are done; count deaths."""
    died = 0
    while committed(place.bus) < groups:
        async with working(place, engine=DiesAfter(place.dialogue, chances.randint(1, 12))) as running:
            with suppress(EngineDead):
                await running.until(lambda: committed(place.bus) == groups)
                break
            died += 1
    return died


@pytest.mark.thorough
async def test_engine_deaths_at_any_moment_drop_no_trajectory(place: Place) -> None:
    offer(place.bus, *range(10), samples=3)
    announce(place.bus, 0)
    assert await run_through_deaths(place, random.Random(7), 10) >= 3, "too few deaths to prove anything"
    records = messages(place.bus, TRAJECTORIES)
    assert all(isinstance(message, TrajectoryFinished) for message in records)
    assert sorted({message.trajectory for message in records}) == ids(*range(10), samples=range(3))


async def test_a_dead_engine_that_counted_as_a_failed_request_would_drop_trajectories(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The counterpart of the previous test: the same deaths, reported as failed requests, drop trajectories."""
    monkeypatch.setattr("palimpsest.services.rollout.trajectory_sampler.EngineFailed", (EngineFailed, EngineDead))
    monkeypatch.setattr(DiesAfter, "watch", ScriptedEngine.watch)
    offer(place.bus, *range(10), samples=3)
    announce(place.bus, 0)
    await run_through_deaths(place, random.Random(7), 10)
    assert any(isinstance(message, TrajectoryDropped) for message in messages(place.bus, TRAJECTORIES))


async def test_an_inconsistent_engine_ends_the_worker(place: Place) -> None:
    class Contradicts(GatedEngine):
        async def generate(self, *args, **kwargs) -> SampledTokens:
            right = await super().generate(*args, **kwargs)
            return SampledTokens(right.tokens, right.logprobs, (), right.stopped)

    offer(place.bus, 0)
    announce(place.bus, 0)
    async with working(place, engine=Contradicts(place.dialogue)) as running:
        with pytest.raises(Contradiction, match="spans cover 0 of 2 sampled tokens"):
            await running.ends()
    assert (committed(place.bus), messages(place.bus, TRAJECTORIES)) == (0, [])
