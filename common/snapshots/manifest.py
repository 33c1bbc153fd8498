"""What stands in the store for a version: which tensors, where their bytes are, and what identifies them.

The version's digest is blake3 over its tensors' names, types, shapes and digests: equal digests mean equal weights,
however they are encoded. The manifest itself carries a digest of its own text, so that a damaged one is noticed.
"""

from collections.abc import Iterable

import msgspec
from blake3 import blake3
from msgspec import Struct

from palimpsest.common.versions import Version

SCHEMA = 1

ITEMSIZE = {
    "bfloat16": 2,
    "float16": 2,
    "float32": 4,
    "float64": 8,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
}
"""Bytes of one number, by torch's name of its type."""


class TensorEntry(Struct, frozen=True, forbid_unknown_fields=True):
    """One tensor: its identity, and where its frame lies in the object."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    digest: str
    """blake3 of the raw little-endian bytes, hex."""
    start: int
    length: int
    """The frame is bytes [start, start + length) of the object."""

    @property
    def size(self) -> int:
        """Raw bytes."""
        count = ITEMSIZE[self.dtype]
        for side in self.shape:
            count *= side
        return count


class Canary(Struct, frozen=True, forbid_unknown_fields=True):
    """A token sequence and what the learner makes of it under this version, at temperature 1."""

    tokens: tuple[int, ...]
    positions: tuple[int, ...]
    """Which tokens are compared; none is the first, which nothing predicts."""
    logprobs: tuple[float, ...]
    """log pi(tokens[p] | tokens[:p]) for each position p, nats."""
    previous: tuple[float, ...]
    """The same under the weights just before these; empty when nobody knows."""


class Manifest(Struct, frozen=True, forbid_unknown_fields=True):
    """A version in the store."""

    schema: int
    run: str
    writer: int
    """Epoch of the learner that stored it (services/snapshot_store/writers.py)."""
    version: Version
    digest: str
    encoding: str
    """`base`: the object holds every tensor whole."""
    object: str
    """blake3 of the object's bytes, hex; also its name."""
    object_size: int
    tensors: tuple[TensorEntry, ...]
    canaries: tuple[Canary, ...]


class SealedManifest(Struct, frozen=True, forbid_unknown_fields=True):
    """A manifest as it is stored."""

    seal: str
    """blake3 of the manifest's text, hex."""
    manifest: msgspec.Raw


class Damaged(Exception):
    """Stored bytes contradict their digest or are not whole; the message says which."""


def version_digest(tensors: Iterable[TensorEntry]) -> str:
    """Identity of the weights, whatever their order and encoding. blake3, hex"""
    hasher = blake3()
    for entry in sorted(tensors, key=lambda entry: entry.name):
        hasher.update(msgspec.json.encode((entry.name, entry.dtype, entry.shape, entry.digest)))
    return hasher.hexdigest()


def seal(manifest: Manifest) -> bytes:
    """The manifest's bytes for the store."""
    text = msgspec.json.encode(manifest)
    return msgspec.json.encode(SealedManifest(blake3(text).hexdigest(), msgspec.Raw(text)))


def unseal(body: bytes) -> Manifest:
    """The manifest in these bytes. Raises Damaged."""
    try:
        sealed = msgspec.json.decode(body, type=SealedManifest)
        if blake3(bytes(sealed.manifest)).hexdigest() != sealed.seal:
            raise Damaged("the manifest contradicts its seal")
        manifest = msgspec.json.decode(sealed.manifest, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Damaged(f"not a manifest: {error}") from error
    if manifest.schema != SCHEMA:
        raise Damaged(f"manifest schema {manifest.schema} is not known here (this is {SCHEMA}): use a newer release")
    if version_digest(manifest.tensors) != manifest.digest:
        raise Damaged(f"version {manifest.version}: its digest is not that of its tensors")
    return manifest
