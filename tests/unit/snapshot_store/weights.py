"""Weights small enough to read in an assertion."""

from collections.abc import AsyncIterator

import numpy as np
from blake3 import blake3

from palimpsest.common.snapshots.codec import encode_base
from palimpsest.common.snapshots.manifest import SCHEMA, Manifest, TensorEntry, version_digest
from palimpsest.common.versions import Version


def an_object(content: int) -> bytes:
    """Return an object with one tensor of one number."""
    return encode_base(np.frombuffer(content.to_bytes(4, "little"), dtype=np.uint8), itemsize=4, level=3)


def digest_of(content: int) -> str:
    """Return the object's name."""
    return blake3(an_object(content)).hexdigest()


def a_manifest(version: int, content: int) -> Manifest:
    """Return the manifest of a version with these weights."""
    raw, body = content.to_bytes(4, "little"), an_object(content)
    entry = TensorEntry("w", "int32", (1,), blake3(raw).hexdigest(), 0, len(body))
    return Manifest(
        schema=SCHEMA,
        run="test",
        writer=1,
        version=Version(version),
        digest=version_digest([entry]),
        encoding="base",
        object=digest_of(content),
        object_size=len(body),
        tensors=(entry,),
        canaries=(),
    )


async def chunks(*pieces: bytes) -> AsyncIterator[bytes]:
    """Yield the pieces of an upload."""
    for piece in pieces:
        yield piece
