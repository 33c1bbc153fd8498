"""The lifespan of an application that holds sessions: expire them while it runs, end them before it stops."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import Any

from palimpsest.common.sessions.sessions import Sessions

SWEEP_S = 1.0
"""Interval between checks for expired leases, in seconds."""


def session_lifespan(
    sessions: Sessions, *, after_sweep: Callable[[], None], on_exit: Callable[[], Awaitable[None]] | None
) -> Callable[[Any], AbstractAsyncContextManager[None]]:
    """Return the lifespan for FastAPI. after_sweep: called after each check; on_exit: after all sessions have ended."""

    async def sweep() -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            sessions.sweep()
            after_sweep()

    @asynccontextmanager
    async def lifespan(_app: Any) -> AsyncIterator[None]:
        sweeping = asyncio.create_task(sweep())
        yield
        sweeping.cancel()
        with suppress(asyncio.CancelledError):
            await sweeping
        sessions.drain()
        if on_exit is not None:
            await on_exit()

    return lifespan
