"""An engine with a token limit, and records of a cut."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Literal

from palimpsest.common.bus.port import Outgoing
from palimpsest.common.bus.sqlite import SqliteBus
from palimpsest.common.config.engines import ScriptedEngineConfig
from palimpsest.common.messages import (
    CONTROL,
    TRAJECTORIES,
    WORKERS,
    CutReached,
    CutReleased,
    CutRequested,
    SegmentFlushed,
    encode,
)
from palimpsest.common.versions import Version
from tests.unit.rollout.working import (
    RUN,
    GatedEngine,
    Place,
    Working,
    announce,
    messages,
    offer,
    turns,
    working,
)


class Gate(asyncio.Event):
    """Set while the engine runs and is below its token limit."""

    def __init__(self, engine: "Limited") -> None:
        super().__init__()
        self._engine, self.more = engine, asyncio.Event()

    def is_set(self) -> bool:
        return super().is_set() and len(self._engine.sampled) < self._engine.limit

    async def wait(self) -> Literal[True]:
        await super().wait()
        while len(self._engine.sampled) >= self._engine.limit:
            self.more.clear()
            await self.more.wait()
        return True


class Limited(GatedEngine):
    """An engine that waits after `limit` tokens in total; each message has 8 tokens."""

    def __init__(self, place: Place, limit: int) -> None:
        super().__init__(place.dialogue)
        self._config = ScriptedEngineConfig(kind="scripted", texts=("abcdefghijklmnopq",), tokens_per_s=1e6)
        self.limit, self.sampled = limit, list[Version]()
        """Version of each token so far."""
        self._running = Gate(self)
        self._running.set()

    def _sample(self, request: str, message: Any) -> None:
        super()._sample(request, message)
        self.sampled.append(message.versions[-1])

    def allow(self, tokens: int) -> None:
        """Raise the limit to this total."""
        self.limit = tokens
        self._running.more.set()  # type: ignore[attr-defined]


def request(bus: SqliteBus, cut: int, version: int) -> None:
    bus.publish(CONTROL, [Outgoing(RUN, encode(CutRequested(RUN, cut, Version(version), 5.0, 1)))])


def release(bus: SqliteBus, cut: int) -> None:
    bus.publish(CONTROL, [Outgoing(RUN, encode(CutReleased(RUN, cut, 1)))])


def reached(bus: SqliteBus) -> list[CutReached]:
    return [message for message in messages(bus, WORKERS) if isinstance(message, CutReached)]


def flushes(bus: SqliteBus) -> list[SegmentFlushed]:
    return [message for message in messages(bus, TRAJECTORIES) if isinstance(message, SegmentFlushed)]


def ends(bus: SqliteBus) -> dict[int, int]:
    """End offsets of the partitions with records."""
    with bus.consumer(TRAJECTORIES) as consumer:
        return {partition: end for partition, end in consumer.ends().items() if end}


async def assert_paused(engine: Limited) -> None:
    """Check that the engine samples no token although its limit allows it."""
    count = len(engine.sampled)
    engine.allow(1000)
    await turns()
    assert len(engine.sampled) == count


@asynccontextmanager
async def worker_mid_message(
    place: Place, tokens: int = 5, *, bus: SqliteBus | None = None, hold_s: float | None = None
) -> AsyncIterator[tuple[Working, Limited]]:
    """A worker whose engine waits after this many tokens of version 0 in the only trajectory."""
    offer(place.bus, 0, samples=1)
    announce(place.bus, 0)
    engine = Limited(place, tokens)
    async with working(place, engine=engine, bus=bus, hold_s=hold_s) as running:
        await running.until(lambda: len(engine.sampled) == tokens)
        yield running, engine
