"""Bodies of log records that are too long for the log, kept for a time after they were last sent.

    claims/<blake3>              a record's body, named by its content

Sending an existing body resets its age, so that a record that is sent twice never outlives its body.
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
        self._arriving: Counter[str] = Counter()
        self._removing = asyncio.Lock()

    @staticmethod
    def key(digest: str) -> str:
        """Return the key of a body."""
        return _PREFIX + digest

    async def put(self, digest: str, chunks: AsyncIterator[bytes]) -> int:
        """Store a body under its digest. Return the number of bytes. Raises DigestMismatch."""
        key = self.key(digest)
        self._arriving[key] += 1  # from here on, no sweep starts to remove it
        try:
            async with self._removing:  # wait for a removal in progress
                pass
            return await self._storage.put(key, chunks, digest=digest)
        finally:
            self._arriving[key] -= 1
            self._arriving += Counter()  # drops zeros

    async def sweep(self, keep_s: float) -> int:
        """Remove bodies that were last sent more than `keep_s` seconds ago. Return their number."""
        gone = 0
        for key in await self._storage.older(_PREFIX, keep_s):
            async with self._removing:
                if key not in self._arriving and await self._storage.older(key, keep_s):  # not sent again meanwhile
                    await self._storage.delete(key)
                    gone += 1
        return gone
