"""Weights of a few tensors for tests of the snapshot store: create, store, fetch and damage them."""

from pathlib import Path

import numpy as np

from palimpsest.common.snapshots.client import RawTensor, SnapshotClient
from palimpsest.common.snapshots.manifest import Canary, Manifest
from palimpsest.common.versions import Version

CANARIES = (Canary((1, 2, 3), (1, 2), (-0.5, -1.25), ()),)
ITEMSIZES = {"bfloat16": 2, "float32": 4, "int64": 8, "uint8": 1, "bool": 1}
MEBIBYTE = 1 << 20


def a_tensor(name: str, dtype: str, shape: tuple[int, ...], seed: int) -> RawTensor:
    """A tensor of random bits, including NaNs, infinities and denormals."""
    size = ITEMSIZES[dtype] * int(np.prod(shape))
    return RawTensor(name, dtype, shape, np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8))


def some_tensors(seed: int) -> list[RawTensor]:
    """Tensors of every dtype and shape that the store must reproduce."""
    return [
        a_tensor("layers.0.weight", "bfloat16", (17, 33), seed),
        a_tensor("norm", "float32", (64,), seed + 1),
        a_tensor("positions", "int64", (5, 1, 3), seed + 2),
        a_tensor("empty", "bfloat16", (0, 8), seed + 3),
        a_tensor("scalar", "float32", (), seed + 4),
        a_tensor("mask", "bool", (9,), seed + 5),
        RawTensor("zeros", "bfloat16", (1000, 100), np.zeros(200_000, dtype=np.uint8)),
    ]


def large(seed: int) -> list[RawTensor]:
    """24 MiB of incompressible data in three tensors."""
    return [a_tensor(f"part {i}", "uint8", (8 * MEBIBYTE,), 10 * seed + i) for i in range(3)]


def plain(tensors: list[RawTensor]) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Name -> dtype, shape and bytes, for comparison."""
    return {t.name: (t.dtype, t.shape, t.raw.tobytes()) for t in tensors}


def put(client: SnapshotClient, version: int, tensors: list[RawTensor]) -> Manifest:
    """Store a version as writer 1."""
    return client.put("t", Version(version), iter(tensors), CANARIES, writer=1)


def fetched(client: SnapshotClient, version: int) -> list[RawTensor]:
    """All tensors of a version."""
    return list(client.tensors(client.manifest(Version(version))))


def flip(path: Path, place: int) -> None:
    """Flip one bit of the byte at this offset of the file."""
    body = bytearray(path.read_bytes())
    body[place] ^= 0x10
    path.write_bytes(body)
