"""Sessions with the built-in environments in the worker's process: no request, the same lifecycle as in the gateway."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from types import TracebackType
from typing import Self, TypeVar

from palimpsest.common.control.errors import HttpError
from palimpsest.common.sessions import instruments
from palimpsest.common.sessions.port import CAPACITY, FIRST_PAUSE_S, LONGEST_PAUSE_S, PATIENCE_S, SessionFailed
from palimpsest.common.sessions.sessions import Sessions
from palimpsest.common.sessions.wire import CreateSession, Lease, Session, Step, TakeStep, TextAction

T = TypeVar("T")
SWEEP_S = 1.0
"""Interval between checks for expired leases, in seconds."""


class InProcessSessions:
    """The port (port.py) over the sessions of this process. Expires them while it is open, and all when it closes."""

    def __init__(
        self,
        sessions: Sessions,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """`clock`, `sleep`: measure the pauses between two attempts, in seconds."""
        self._sessions, self._clock, self._sleep = sessions, clock, sleep
        self._sweeping: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._sweeping = asyncio.create_task(self._sweep())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._sweeping is not None
        self._sweeping.cancel()
        with suppress(asyncio.CancelledError):
            await self._sweeping
        self._sessions.drain()

    def has(self, session_id: str) -> bool:
        """Return whether the session is one of this process, live or ended not long ago."""
        return self._sessions.has(session_id)

    async def create(self, request: CreateSession, *, idempotency_key: str, capacity_s: float = PATIENCE_S) -> Session:
        """See EnvironmentSessions."""
        pause_s, began = FIRST_PAUSE_S, self._clock()
        while True:
            try:
                body = await _answered(self._sessions.create(request, idempotency_key))
                return Session.model_validate_json(body)
            except SessionFailed as error:
                if error.code != CAPACITY or began + capacity_s - self._clock() <= pause_s:
                    raise
            await self._sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    async def step(self, session_id: str, number: int, text: str) -> Step:
        """See EnvironmentSessions."""
        taken = TakeStep(step=number, action=TextAction(type="text", text=text))
        return Step.model_validate_json(await _answered(self._sessions.step(session_id, taken)))

    async def heartbeat(self, session_id: str) -> Lease:
        """See EnvironmentSessions."""

        async def renew() -> Lease:
            return self._sessions.heartbeat(session_id)

        return await _answered(renew())

    async def finalize(self, session_id: str) -> Step:
        """See EnvironmentSessions."""
        return Step.model_validate_json(await _answered(self._sessions.finalize(session_id)))

    async def close(self, session_id: str) -> None:
        """See EnvironmentSessions."""
        self._sessions.close(session_id)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            self._sessions.sweep()


async def _answered(call: Awaitable[T]) -> T:
    """Return the answer of a call. Raises SessionFailed with the code that the gateway would send."""
    try:
        return await call
    except HttpError as error:
        code = str(error.body["code"])
        instruments.REFUSED.labels(code).inc()
        raise SessionFailed(code, str(error)) from None
