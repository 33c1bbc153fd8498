"""Configuration, contents, and unfinished uploads of a MinIO storage, for its tests."""

from collections.abc import AsyncIterator
from typing import Any

from palimpsest.common.config.schema import SnapshotStoreConfig
from palimpsest.services.snapshot_store.storage_minio import MinioStorage

BUCKET = "unit"


async def chunks(*pieces: bytes) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


def config(endpoint: str, **more: Any) -> SnapshotStoreConfig:
    return SnapshotStoreConfig(**{"storage": "s3", "endpoint": endpoint, "bucket": BUCKET, **more})


def unfinished(storage: MinioStorage, key: str) -> int:
    listed = storage._client._list_multipart_uploads(BUCKET, prefix=f"{storage._prefix}{key}")
    return len(listed.uploads)


async def gone_after(piece: bytes) -> AsyncIterator[bytes]:
    """Yield one piece, then lose the connection."""
    yield piece
    raise ConnectionError
