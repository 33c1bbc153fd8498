"""Places of the storage contract, and bodies to upload."""

from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from pathlib import Path

from palimpsest.common.config.schema import SnapshotStoreConfig
from palimpsest.services.snapshot_store.storage import Storage
from palimpsest.services.snapshot_store.storage_disk import DiskStorage
from palimpsest.services.snapshot_store.storage_minio import MinioStorage


@dataclass(frozen=True)
class Disk:
    """A folder. Any process may call `open`."""

    folder: Path

    def open(self) -> Storage:
        return DiskStorage(self.folder)


@dataclass(frozen=True)
class S3:
    """A prefix of a bucket. Any process that inherits the credentials may call `open`."""

    endpoint: str
    prefix: str

    def open(self) -> Storage:
        return MinioStorage(self.config, prefix=self.prefix)

    @property
    def config(self) -> SnapshotStoreConfig:
        return SnapshotStoreConfig(storage="s3", endpoint=self.endpoint, bucket="contract", create_bucket=True)


Place = Disk | S3
MEBIBYTE = 1 << 20
A_PIECE = bytes(range(256)) * 4096
LARGE = [A_PIECE] * 70
"""A body of several read pieces and more than two parts of an S3 upload."""


async def chunks(*pieces: bytes) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


async def broken(pieces: Iterable[bytes]) -> AsyncIterator[bytes]:
    """An upload that fails in the middle."""
    for piece in pieces:
        yield piece
    raise ConnectionError("the sender is gone")


async def streamed(storage: Storage, key: str) -> bytes:
    return b"".join([piece async for piece in storage.stream(key)])
