"""What the catalogue needs of a place for bytes. One contract suite runs on every adapter."""

from collections.abc import AsyncIterator
from typing import Protocol


class Storage(Protocol):
    """Named byte strings. A name is there whole or not at all."""

    async def put(self, key: str, chunks: AsyncIterator[bytes], *, digest: str | None = None) -> int:
        """Store under `key`; bytes written. Raises DigestMismatch, leaving nothing, when blake3 differs."""

    async def create(self, key: str, body: bytes) -> bool:
        """Store under `key` unless it exists; whether it was stored. Of several at once, one wins."""

    async def read(self, key: str) -> bytes | None:
        """The whole body, or None."""

    def stream(self, key: str) -> AsyncIterator[bytes]:
        """The body in pieces; raises KeyError when it is not there."""

    async def size(self, key: str) -> int | None:
        """Bytes under `key`, or None."""

    async def keys(self, prefix: str) -> list[str]:
        """Every key that begins with `prefix`, sorted."""

    async def delete(self, key: str) -> None:
        """Remove; harmless when it is not there."""


class DigestMismatch(ValueError):
    """The bytes that arrived are not those that were announced."""
