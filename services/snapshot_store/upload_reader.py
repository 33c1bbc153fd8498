"""Lets a thread read an upload from an asynchronous sender; the end is reached only if the digest matches."""

import asyncio
from collections.abc import AsyncIterator

from blake3 import blake3

from palimpsest.services.snapshot_store.storage import DigestMismatch


class UploadReader:
    """Create it on the sender's event loop. Buffers at most the requested bytes and one piece."""

    def __init__(self, chunks: AsyncIterator[bytes], digest: str | None) -> None:
        self._chunks, self._digest = chunks, digest
        self._loop = asyncio.get_running_loop()
        self._hasher, self._held, self._ended = blake3(), bytearray(), False
        self._taking: asyncio.Task[bytes] | None = None
        self._stopped = False
        self.size = 0
        """Number of received bytes."""
        self.failure: BaseException | None = None
        """The error that ended the upload, or None."""

    async def read_short(self, limit: int) -> bytes | None:
        """Return the body if it is shorter than `limit`, else None. Raises DigestMismatch and the sender's errors."""
        await self._fill(limit)
        return bytes(self._held) if self._ended else None

    def read(self, size: int = -1) -> bytes:
        """Return the next `size` bytes, fewer at the end, for a thread. Raises like `read_short` and after `stop`."""
        return asyncio.run_coroutine_threadsafe(self._take(size), self._loop).result()

    def stop(self) -> None:
        """Stop the upload: a reading thread gets an error."""
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
        except BaseException as error:
            self.failure = error
            raise

    def _end(self) -> None:
        self._ended = True
        digest = self._hasher.hexdigest()
        if self._digest is not None and digest != self._digest:
            raise DigestMismatch(f"received {self.size} bytes with digest {digest}, but {self._digest} was announced")
