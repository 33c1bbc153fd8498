"""Snapshot stores over a bucket of a real MinIO, each with a unique prefix, and weights to store."""

import asyncio
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from palimpsest.common.config.schema import SnapshotStoreConfig
from palimpsest.common.snapshots.client import RawTensor, SnapshotClient
from palimpsest.common.snapshots.manifest import Canary, Manifest
from palimpsest.common.snapshots.writer import Writer
from palimpsest.common.versions import Version
from palimpsest.services.snapshot_store.storage_minio import MinioStorage
from tests.servers.backends import s3_client
from tests.servers.stores import ServedStore, StoreProcess
from tools.backends.minio import Minio

BUCKET = "runs"
MEBIBYTE = 1 << 20
CANARIES = (Canary((1, 2, 3), (1, 2), (-0.5, -1.25), ()),)
RUN = """
run.id = "t"
run.folder = "{folder}"
model.path = "none"
tasks.environments = {{ lookup = 1.0 }}
learner.versions = 1
snapshot_store.sweep_s = 0.05
snapshot_store.storage = "s3"
snapshot_store.endpoint = "{endpoint}"
snapshot_store.prefix = "{prefix}"
snapshot_store.bucket = "runs"
snapshot_store.create_bucket = true
"""


SWEEP_S = 0.05


def objects(minio: Minio, prefix: str, under: str = "objects/") -> dict[str, int]:
    """Keys in the bucket below prefix + under -> size in bytes."""
    start = prefix + under
    listed = s3_client(minio).list_objects(BUCKET, start, recursive=True)
    return {(entry.object_name or "")[len(start) :]: entry.size or 0 for entry in listed}


class Store(ServedStore):
    """Snapshot store over one prefix of the bucket, in this process."""

    def __init__(self, minio: Minio, *, prefix: str = "", claims_keep_s: float, **settings: Any) -> None:
        self.minio, self.prefix = minio, prefix or f"{uuid.uuid4().hex}/"
        kept = SnapshotStoreConfig(storage="s3", endpoint=minio.endpoint, bucket=BUCKET, create_bucket=True, **settings)
        asyncio.run(MinioStorage(kept, prefix=self.prefix).open())
        self.storage = MinioStorage(kept, prefix=self.prefix)
        super().__init__(self.storage, sweep_s=SWEEP_S, claims_keep_s=claims_keep_s)

    def objects(self, under: str = "objects/") -> dict[str, int]:
        """What the bucket holds for this store, with its size."""
        return objects(self.minio, self.prefix, under)


class Process(StoreProcess):
    """Snapshot store over one prefix of the bucket, in a separate process."""

    def __init__(self, home: Path, minio: Minio, *more: str) -> None:
        self.minio, self.prefix = minio, f"{uuid.uuid4().hex}/"
        run = home / "run.toml"
        run.write_text(RUN.format(folder=home / "runs", endpoint=minio.endpoint, prefix=self.prefix))
        credentials = {"MINIO_ACCESS_KEY": minio.access_key, "MINIO_SECRET_KEY": minio.secret_key}
        super().__init__(run, *more, environment=credentials)

    def objects(self, under: str = "objects/") -> dict[str, int]:
        """What the bucket holds for this store, with its size."""
        return objects(self.minio, self.prefix, under)


def some(seed: int, *, parts: int = 3, size: int = 1000) -> list[RawTensor]:
    """Incompressible tensors."""
    numbers = np.random.default_rng(seed)
    return [
        RawTensor(f"part {i}", "uint8", (size,), numbers.integers(0, 256, size, dtype=np.uint8)) for i in range(parts)
    ]


def plain(tensors: list[RawTensor]) -> list[tuple[str, bytes]]:
    """Names and bytes of the tensors, for comparison."""
    return [(tensor.name, tensor.raw.tobytes()) for tensor in tensors]


def put(client: SnapshotClient, version: int, tensors: list[RawTensor]) -> Manifest:
    """Store a version as a new writer."""
    return client.put("t", Version(version), iter(tensors), CANARIES, writer=a_writer(client))


def a_writer(client: SnapshotClient) -> int:
    """Register a writer and return its epoch."""
    writer = Writer(client, "tests")
    writer.begin()
    return writer.epoch


def tamper(store: Store, manifest: Manifest, change: Callable[[bytes], bytes]) -> None:
    """Change an object in the bucket without the store."""
    client, name = s3_client(store.minio), f"{store.prefix}objects/{manifest.object}"
    body = change(client.get_object("runs", name).data)
    client._put_object("runs", name, body)
