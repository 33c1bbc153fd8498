"""Renews the lease of a session while the worker waits for something else, such as the model's message."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Protocol, TypeVar

T = TypeVar("T")
RENEWALS_PER_LEASE = 3
"""Renewals within one lease. Two of them can be late before the lease ends."""


class Timer(Protocol):
    """A call in the future."""

    def cancel(self) -> None:
        """Leave the call out, if it has not been made."""


Later = Callable[[float, Callable[[], None]], Timer]
"""Makes a call after a number of seconds."""


def call_later(seconds: float, call: Callable[[], None]) -> Timer:
    """Make the call after this time, in the running event loop."""
    return asyncio.get_running_loop().call_later(seconds, call)


async def with_renewals(
    waiting: Coroutine[Any, Any, T], renew: Callable[[], Awaitable[Any]], *, lease_s: float, later: Later = call_later
) -> T:
    """Return the result of `waiting`. Call `renew` every third of `lease_s` seconds until `waiting` is done.

    Cancels `waiting` if a renewal fails, and raises the error of the renewal: without its lease the session is lost.
    """
    task = asyncio.current_task()
    assert task is not None
    cancelled_before = task.cancelling()
    renewals = _Renewals(task, renew, lease_s / RENEWALS_PER_LEASE, later)
    try:
        return await waiting
    except asyncio.CancelledError:
        if renewals.lost is not None and task.uncancel() <= cancelled_before:
            raise renewals.lost from None
        raise  # the caller is cancelled, too
    finally:
        await renewals.end()


class _Renewals:
    """Renews at intervals. Most messages are shorter than the first one, so only a renewal has a task, not the wait."""

    def __init__(
        self, task: asyncio.Task[Any], renew: Callable[[], Awaitable[Any]], every_s: float, later: Later
    ) -> None:
        """task: waits meanwhile; it is cancelled if a renewal fails."""
        self._task, self._renew, self._every_s, self._later = task, renew, every_s, later
        self.lost: Exception | None = None
        """The error of the renewal that failed."""
        self._renewing: asyncio.Task[None] | None = None
        self._ended = False
        self._timer = later(every_s, self._begin)

    def _begin(self) -> None:
        self._renewing = asyncio.create_task(self._renew_once())

    async def _renew_once(self) -> None:
        try:
            await self._renew()
        except Exception as error:
            if not self._ended:
                self.lost = error
                self._task.cancel()
        else:
            if not self._ended:
                self._timer = self._later(self._every_s, self._begin)

    async def end(self) -> None:
        """Begin no further renewal, and end one in progress."""
        self._ended = True
        self._timer.cancel()
        if self._renewing is not None and not self._renewing.done():
            self._renewing.cancel()
            await asyncio.wait({self._renewing})
