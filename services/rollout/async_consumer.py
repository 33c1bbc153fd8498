"""A consumer as coroutines use it."""

import asyncio
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import TracebackType
from typing import Self, TypeVar

from palimpsest.common.bus.port import Consumer, Record

T = TypeVar("T")


class AsyncConsumer:
    """Its consumer's calls run in a thread, one at a time; leaving the block waits for the call under way.

    A consumer must not be closed under a thread that still reads, and a cancelled coroutine does not end its thread.
    """

    def __init__(self, consumer: Consumer) -> None:
        self._consumer = consumer
        self._turn = asyncio.Lock()

    async def poll(self, *, limit: int, timeout_s: float) -> list[Record]:
        """See Consumer. With limit 0 it only keeps the membership of the group."""
        return await self._call(lambda: self._consumer.poll(limit=limit, timeout_s=timeout_s))

    async def commit(self, offsets: Mapping[int, int]) -> None:
        """See Consumer."""
        await self._call(lambda: self._consumer.commit(offsets))

    def assignment(self) -> frozenset[int]:
        """See Consumer."""
        return self._consumer.assignment()

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
                while not calling.done():  # a second cancellation must not end the wait either
                    with suppress(asyncio.CancelledError):
                        await asyncio.wait({calling})
