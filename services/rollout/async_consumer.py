"""An asynchronous wrapper of a consumer."""

import asyncio
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import TracebackType
from typing import Self, TypeVar

from palimpsest.common.bus.port import Consumer, Record
from palimpsest.common.instruments import report_lag

T = TypeVar("T")


class AsyncConsumer:
    """Runs the calls of a consumer in a thread, one at a time.

    Leaving the `async with` block waits for the running call and then closes the consumer: a consumer must not be
    closed while a thread reads from it, and cancelling a coroutine does not end its thread.

    lag_of: topic whose unread records each poll reports as a metric.
    """

    def __init__(self, consumer: Consumer, *, lag_of: str | None = None) -> None:
        self._consumer, self._topic = consumer, lag_of
        self._turn = asyncio.Lock()

    async def poll(self, *, limit: int, timeout_s: float) -> list[Record]:
        """See Consumer. With limit 0 the call only keeps the membership of the group."""

        def call() -> list[Record]:
            records = self._consumer.poll(limit=limit, timeout_s=timeout_s)
            if self._topic is not None:
                report_lag(self._topic, self._consumer)
            return records

        return await self._call(call)

    async def commit(self, offsets: Mapping[int, int]) -> None:
        """See Consumer."""
        await self._call(lambda: self._consumer.commit(offsets))

    def assignment(self) -> frozenset[int]:
        """See Consumer."""
        return self._consumer.assignment()

    def positions(self) -> dict[int, int]:
        """See Consumer."""
        return self._consumer.positions()

    async def ends(self) -> dict[int, int]:
        """See Consumer."""
        return await self._call(self._consumer.ends)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        async with self._turn:
            self._consumer.close()

    async def _call(self, call: Callable[[], T]) -> T:
        async with self._turn:
            calling = asyncio.ensure_future(asyncio.to_thread(call))
            try:
                return await asyncio.shield(calling)
            finally:
                while not calling.done():  # a second cancellation must not end this wait
                    with suppress(asyncio.CancelledError):
                        await asyncio.wait({calling})
