"""A consumer closes after its last call returns, even if the caller is cancelled several times."""

import asyncio
import threading
from pathlib import Path

import pytest

from palimpsest.common.bus.port import Outgoing, Record
from palimpsest.common.bus.sqlite import SqliteBus
from palimpsest.services.rollout.async_consumer import AsyncConsumer
from tests.processes.waiting import LIMIT_S


class SlowConsumer:
    """A consumer whose poll blocks until released; it records its calls in order."""

    def __init__(self) -> None:
        self.polling, self.back = threading.Event(), threading.Event()
        self.events: list[str] = []

    def poll(self, *, limit: int, timeout_s: float) -> list[Record]:
        self.events.append("poll")
        self.polling.set()
        assert self.back.wait(LIMIT_S)
        self.events.append("back")
        return []

    def close(self) -> None:
        self.events.append("close")


@pytest.mark.parametrize("cancellations", [1, 2, 3])
async def test_the_consumer_closes_after_the_running_call_returns(cancellations: int) -> None:
    consumer = SlowConsumer()

    async def read() -> None:
        async with AsyncConsumer(consumer) as reader:  # type: ignore[arg-type]
            await reader.poll(limit=1, timeout_s=0.0)

    reading = asyncio.create_task(read())
    assert await asyncio.to_thread(consumer.polling.wait, LIMIT_S)
    for _ in range(cancellations):
        reading.cancel()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    done, events = reading.done(), list(consumer.events)
    consumer.back.set()
    assert (done, events) == (False, ["poll"])
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert consumer.events == ["poll", "back", "close"]


async def test_calls_run_one_at_a_time() -> None:
    consumer = SlowConsumer()
    async with AsyncConsumer(consumer) as reader:  # type: ignore[arg-type]
        first = asyncio.create_task(reader.poll(limit=1, timeout_s=0.0))
        assert await asyncio.to_thread(consumer.polling.wait, LIMIT_S)
        second = asyncio.create_task(reader.poll(limit=1, timeout_s=0.0))
        await asyncio.sleep(0)
        assert consumer.events == ["poll"]
        consumer.back.set()
        await asyncio.gather(first, second)
    assert consumer.events == ["poll", "back", "poll", "back", "close"]


async def test_results_and_errors_of_calls_are_passed_on(tmp_path: Path) -> None:
    bus = SqliteBus(tmp_path / "bus.sqlite")
    bus.create_topics({"things": 1})
    bus.publish("things", [Outgoing("key", b"body")])
    async with AsyncConsumer(bus.consumer("things", group="group", member="member")) as reader:
        (record,) = await reader.poll(limit=1, timeout_s=1.0)
        assert (record.body, await reader.ends(), reader.assignment()) == (b"body", {0: 1}, {0})
        await reader.commit({0: 1})
    async with AsyncConsumer(bus.consumer("things")) as reader:
        with pytest.raises(ValueError, match="has nothing to commit to"):
            await reader.commit({0: 1})
    bus.close()
