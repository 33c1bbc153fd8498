"""Slots for trajectories in flight, of which a running worker can have more or fewer."""

import asyncio


class Slots:
    """Like asyncio.Semaphore, with a size that can change. Fewer slots take effect as trajectories end."""

    def __init__(self, size: int) -> None:
        self._size, self._taken = size, 0
        self._changed = asyncio.Event()

    async def acquire(self) -> None:
        """Wait for a free slot and take it."""
        while self._taken >= self._size:
            self._changed.clear()
            await self._changed.wait()
        self._taken += 1

    def release(self) -> None:
        """Free a slot."""
        self._taken -= 1
        self._changed.set()

    @property
    def free(self) -> int:
        """Number of free slots."""
        return max(0, self._size - self._taken)

    def resize(self, size: int) -> None:
        """Have this many slots from now on."""
        self._size = size
        self._changed.set()
