"""An engine that starts with its first version."""

import asyncio

import pytest

from palimpsest.common.config.engines import ScriptedEngineConfig
from palimpsest.common.user_error import ExitCode, UserError
from palimpsest.services.rollout.engine.late_start import LateStart
from palimpsest.services.rollout.engine.port import EngineFailed
from palimpsest.services.rollout.engine.scripted import ScriptedEngine
from tests.unit.rollout.engine.test_scripted import weights


class Slow(ScriptedEngine):
    """Its start waits, and may fail."""

    def __init__(self) -> None:
        super().__init__(ScriptedEngineConfig(kind="scripted", texts=("a",)), encode=lambda _: [5])
        self.calls: list[str] = []
        self.go = asyncio.Event()
        self.fails = False

    async def start(self) -> None:
        self.calls.append("start")
        await self.go.wait()
        if self.fails:
            raise EngineFailed("no memory")
        self.calls.append("started")

    async def pause(self) -> None:
        self.calls.append("pause")
        await super().pause()

    async def sleep(self) -> None:
        self.calls.append("sleep")
        await super().sleep()

    async def close(self) -> None:
        self.calls.append("close")
        await super().close()


async def test_a_cut_before_the_first_version_starts_nothing() -> None:
    engine = Slow()
    late = LateStart(engine)
    await late.start()
    await late.pause()
    await late.sleep()
    await late.resume()
    assert await late.partial("any") is None
    assert engine.calls == []
    engine.go.set()
    await late.load(weights(0))
    await late.load(weights(0))
    await late.sleep()
    assert engine.calls == ["start", "started", "pause", "sleep"]


async def test_a_worker_that_ends_during_the_start_waits_for_it_and_closes_the_engine() -> None:
    engine = Slow()
    late = LateStart(engine)
    loading = asyncio.create_task(late.load(weights(0)))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    loading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await loading
    closing = asyncio.create_task(late.close())
    await asyncio.sleep(0)
    assert engine.calls == ["start"]
    engine.go.set()
    await closing
    assert engine.calls == ["start", "started", "close"]


async def test_a_start_that_fails_ends_the_worker() -> None:
    engine = Slow()
    engine.fails = True
    engine.go.set()
    late = LateStart(engine)
    with pytest.raises(UserError, match="no memory") as error:
        await late.load(weights(0))
    assert error.value.code == ExitCode.ENGINE
    await late.close()
    assert engine.calls == ["start", "close"]
