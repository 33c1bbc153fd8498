"""What the catalog needs of a place for bytes. One contract suite runs on every adapter."""

from collections.abc import AsyncIterator
from typing import Protocol


class Storage(Protocol):
    """Named byte strings. A name is there whole or not at all.

    Every method raises Unavailable while the place does not answer, OSError (palimpsest.common.files.FULL) while it is
    full, and ValueError for a name that is not a key.
    """

    async def put(self, key: str, chunks: AsyncIterator[bytes], *, digest: str | None = None) -> int:
        """Store under `key`; bytes written. Raises DigestMismatch, leaving nothing, when blake3 differs."""

    async def create(self, key: str, body: bytes) -> bool:
        """Store under `key` unless it exists; whether this call stored it. Of several at once, one wins.

        After Unavailable the body may stand all the same: whoever tries again and gets False has to look whose it is.
        """

    async def read(self, key: str) -> bytes | None:
        """The whole body, or None."""

    def stream(self, key: str) -> AsyncIterator[bytes]:
        """The body in pieces of at most 1 MiB; raises KeyError when it is not there."""

    async def address(self, key: str) -> str | None:
        """Where anybody may fetch the body for a while, whether it is there or not; None: only through here."""

    async def size(self, key: str) -> int | None:
        """Bytes under `key`, or None."""

    async def keys(self, prefix: str) -> list[str]:
        """Every key that begins with `prefix`, sorted."""

    async def older(self, prefix: str, age_s: float) -> list[str]:
        """Those keys among them whose body was stored longer ago than this, sorted."""

    async def delete(self, key: str) -> None:
        """Remove; harmless when it is not there."""


class DigestMismatch(ValueError):
    """The bytes that arrived are not those that were announced."""


class Unavailable(Exception):
    """The place for bytes does not answer, or refuses; the message says which. Trying again later may help."""

    def __init__(self, message: str, *, address: str = "") -> None:
        super().__init__(message)
        self.address = address
        """Of the S3; empty when it is none."""


def parts(key: str) -> list[str]:
    """The parts of a key between its slashes. Raises ValueError unless each is a plain name.

    >>> parts("versions/00000003.json")
    ['versions', '00000003.json']
    """
    names = key.split("/")
    if not all(name and name[0] != "." for name in names):
        raise ValueError(f"{key!r} is not a key")
    return names
