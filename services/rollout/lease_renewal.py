"""Renews the lease of a session while the worker waits for something else, such as the model's message."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Never, TypeVar

T = TypeVar("T")
RENEWALS_PER_LEASE = 3
"""Renewals within one lease. Two of them can be late before the lease ends."""

Sleep = Callable[[float], Awaitable[None]]


async def with_renewals(
    waiting: Coroutine[Any, Any, T], renew: Callable[[], Awaitable[Any]], *, lease_s: float, sleep: Sleep
) -> T:
    """Return the result of `waiting`. Call `renew` every third of `lease_s` seconds until `waiting` is done.

    Cancels `waiting` if a renewal fails, and raises the error of the renewal: without its lease the session is lost.
    """
    work = asyncio.create_task(waiting)
    renewing = asyncio.create_task(_renew(renew, lease_s / RENEWALS_PER_LEASE, sleep))
    try:
        await asyncio.wait({work, renewing}, return_when=asyncio.FIRST_COMPLETED)
        return work.result() if work.done() else renewing.result()
    finally:
        work.cancel()
        renewing.cancel()
        await asyncio.gather(work, renewing, return_exceptions=True)


async def _renew(renew: Callable[[], Awaitable[Any]], every_s: float, sleep: Sleep) -> Never:
    while True:
        await sleep(every_s)
        await renew()
