"""The port of storages for bytes. One contract suite runs on every adapter."""

from collections.abc import AsyncIterator
from typing import Protocol


class Storage(Protocol):
    """Stores named byte strings. A name exists with its complete body or not at all.

    Every method raises Unavailable while the storage does not answer, OSError (palimpsest.common.files.FULL) while it
    is full, and ValueError for a name that is not a key.
    """

    async def put(self, key: str, chunks: AsyncIterator[bytes], *, digest: str | None = None) -> int:
        """Store under `key`; return the number of bytes. Raises DigestMismatch, storing nothing, if blake3 differs."""

    async def create(self, key: str, body: bytes) -> bool:
        """Store under `key` unless it exists. Return whether this call stored it; of concurrent calls, one does.

        After Unavailable the body may be stored nevertheless: if a retry returns False, the caller must compare bodies.
        """

    async def read(self, key: str) -> bytes | None:
        """Return the body, or None."""

    def stream(self, key: str) -> AsyncIterator[bytes]:
        """Yield the body in pieces of at most 1 MiB. Raises KeyError if it does not exist."""

    async def address(self, key: str) -> str | None:
        """Return a temporary address for the body, whether or not it exists; None: only the store can read it."""

    async def size(self, key: str) -> int | None:
        """Return the number of bytes under `key`, or None."""

    async def keys(self, prefix: str) -> list[str]:
        """Return all keys that begin with `prefix`, sorted."""

    async def older(self, prefix: str, age_s: float) -> list[str]:
        """Return the keys with this prefix whose body was stored more than `age_s` seconds ago, sorted."""

    async def delete(self, key: str) -> None:
        """Remove the body; no effect if it does not exist."""


class DigestMismatch(ValueError):
    """The received bytes do not match the announced digest."""


class Unavailable(Exception):
    """The storage does not answer, or refuses; the message has the reason. A later retry may succeed."""

    def __init__(self, message: str, *, address: str = "") -> None:
        super().__init__(message)
        self.address = address
        """Address of the S3; empty for other storages."""


def parts(key: str) -> list[str]:
    """Return the parts of a key between its slashes. Raises ValueError unless each is a plain name.

    >>> parts("versions/00000003.json")
    ['versions', '00000003.json']
    """
    names = key.split("/")
    if not all(name and name[0] != "." for name in names):
        raise ValueError(f"{key!r} is not a key")
    return names
