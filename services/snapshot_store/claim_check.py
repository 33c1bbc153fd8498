"""Bodies of log records too long for the log, kept for a time after they were last sent.

    claims/<blake3>              a record's body, named by its content

Sending a body that stands makes it young again, so that a record sent twice never outlives its body.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator

from palimpsest.services.snapshot_store.storage import Storage

_PREFIX = "claims/"


class ClaimCheckBlobs:
    """Bodies over a Storage."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._coming: Counter[str] = Counter()
        self._removing = asyncio.Lock()

    @staticmethod
    def key(digest: str) -> str:
        """Where a body stands."""
        return _PREFIX + digest

    async def put(self, digest: str, chunks: AsyncIterator[bytes]) -> int:
        """Store a body under its digest; bytes. Raises DigestMismatch."""
        key = self.key(digest)
        self._coming[key] += 1  # no removal of it begins from here on,
        try:
            async with self._removing:  # and one under way ends first
                pass
            return await self._storage.put(key, chunks, digest=digest)
        finally:
            self._coming[key] -= 1
            self._coming += Counter()  # drops zeros

    async def sweep(self, keep_s: float) -> int:
        """Remove bodies last sent longer ago than this; how many."""
        gone = 0
        for key in await self._storage.older(_PREFIX, keep_s):
            async with self._removing:
                if key not in self._coming and await self._storage.older(key, keep_s):  # nor sent since the look
                    await self._storage.delete(key)
                    gone += 1
        return gone
