"""Waits for and cancels several tasks."""

import asyncio
from collections.abc import Collection
from typing import Any


async def wait_first(tasks: "Collection[asyncio.Task[Any]]") -> None:
    """Wait until one of the tasks ends. Raises its error."""
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        task.result()


async def cancel_all(tasks: "Collection[asyncio.Task[Any]]") -> None:
    """Cancel the tasks and wait until they end."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
