"""An upload as a thread reads it: bytes from an asynchronous sender, whose end is told only if the digest is right."""

import asyncio
from collections.abc import AsyncIterator

from blake3 import blake3

from palimpsest.services.snapshot_store.storage import DigestMismatch


class UploadReader:
    """Made on the event loop that the sender belongs to. Holds no more than what was asked for and one piece."""

    def __init__(self, chunks: AsyncIterator[bytes], digest: str | None) -> None:
        self._chunks, self._digest = chunks, digest
        self._loop = asyncio.get_running_loop()
        self._hasher, self._held, self._ended = blake3(), bytearray(), False
        self._taking: asyncio.Task[bytes] | None = None
        self._stopped = False
        self.size = 0
        """Bytes that have come."""
        self.failure: BaseException | None = None
        """Why the end was never told."""

    async def read_short(self, limit: int) -> bytes | None:
        """The whole body if it has fewer bytes than this. Raises DigestMismatch, and what the sender raises."""
        await self._fill(limit)
        return bytes(self._held) if self._ended else None

    def read(self, size: int = -1) -> bytes:
        """The next `size` bytes, fewer at the end, for a thread. Raises like `read_short`, and after `stop`."""
        return asyncio.run_coroutine_threadsafe(self._take(size), self._loop).result()

    def stop(self) -> None:
        """Nothing more is wanted: a thread that reads gets an error."""
        self._stopped = True
        if self._taking is not None:
            self._taking.cancel()

    async def _take(self, size: int) -> bytes:
        if self._stopped:
            raise ConnectionAbortedError("the upload was stopped")
        self._taking = asyncio.current_task()
        try:
            await self._fill(size)
        finally:
            self._taking = None
        taken = bytes(self._held[:size])
        del self._held[:size]
        return taken

    async def _fill(self, size: int) -> None:
        try:
            while len(self._held) < size and not self._ended:
                chunk = await anext(self._chunks, None)
                if chunk is None:
                    self._end()
                else:
                    self._hasher.update(chunk)
                    self.size += len(chunk)
                    self._held += chunk
        except BaseException as failure:
            self.failure = failure
            raise

    def _end(self) -> None:
        self._ended = True
        came = self._hasher.hexdigest()
        if self._digest is not None and came != self._digest:
            raise DigestMismatch(f"{self.size} bytes arrived with digest {came}, announced was {self._digest}")
