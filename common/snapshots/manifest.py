"""Manifest of a version in the store: its tensors, the place of their bytes, and their digests.

The bytes of a version are one object, or several, each written by another rank of the learner; they are read as one
stream.

The digest of a version is blake3 over the names, types, shapes and digests of its tensors. Equal digests mean equal
weights, independent of the encoding. A stored manifest carries a digest of its own text, which reveals damage.
"""

from collections.abc import Iterable, Mapping

import msgspec
from blake3 import blake3
from msgspec import UNSET, Struct, UnsetType

from palimpsest.common.snapshots.adapter import Adapter
from palimpsest.common.versions import Version

SCHEMA, PARTS_SCHEMA = 2, 3
"""Schemas that this release writes: of a version in one object, and in several."""
SCHEMAS = (1, SCHEMA, PARTS_SCHEMA)
"""Schemas that this release reads. Schema 1 has only the encoding `base`."""
ENCODINGS = ("base", "slices", "delta")

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
"""torch dtype name -> bytes per number."""


class TensorEntry(Struct, frozen=True, forbid_unknown_fields=True):
    """One tensor: its identity, and the position of its frame in the object."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    digest: str
    """blake3 of the raw little-endian bytes, hex."""
    start: int
    length: int
    """The frame is bytes [start, start + length) of the object, or of all objects one after another."""

    @property
    def size(self) -> int:
        """Number of raw bytes."""
        count = ITEMSIZE[self.dtype]
        for side in self.shape:
            count *= side
        return count


class Canary(Struct, frozen=True, forbid_unknown_fields=True):
    """A token sequence and its log-probs on the learner under this version, at temperature 1."""

    tokens: tuple[int, ...]
    positions: tuple[int, ...]
    """Indexes of the tokens to compare. They exclude index 0, because no token predicts the first one."""
    logprobs: tuple[float, ...]
    """log pi(tokens[p] | tokens[:p]) for each position p, in the learner's precision, nats."""
    previous: tuple[float, ...]
    """The same in float32 under the previous version; empty if unknown."""
    float32: tuple[float, ...] = ()
    """The same as `logprobs`, computed in float32. Empty in a manifest of a release that did not store it; `previous`
    is then in the learner's precision."""


class Parent(Struct, frozen=True, forbid_unknown_fields=True):
    """The version that a delta begins with."""

    version: Version
    digest: str


class StoredObject(Struct, frozen=True, forbid_unknown_fields=True):
    """An object in the store."""

    digest: str
    """blake3 of its bytes, hex; also its name."""
    size: int
    """Bytes."""


class Manifest(Struct, frozen=True, forbid_unknown_fields=True):
    """A version in the store."""

    schema: int
    run: str
    writer: int
    """Epoch of the learner that stored it (services/snapshot_store/writers.py)."""
    version: Version
    digest: str
    encoding: str
    """`base`: the object holds every tensor whole, in one frame each (codec.py). `slices`: whole, in slices
    (slices.py). `delta`: slices that lead from the parent version to this one."""
    object: str
    """blake3 of the object's bytes, hex; also its name. Of a version with parts: `parts_digest` of them, which names no
    object."""
    object_size: int
    """Bytes of all objects."""
    tensors: tuple[TensorEntry, ...]
    canaries: tuple[Canary, ...]
    parent: Parent | None = None
    """The version from which the slices of a delta lead here; None for the other encodings."""
    encodings: Mapping[str, int] = {}
    """Kind of slice -> number of slices of this kind in the object; empty for `base`."""
    adapter: Adapter | UnsetType = UNSET
    """What the tensors mean if they are an adapter; absent if they are the whole weights."""
    parts: tuple[StoredObject, ...] | UnsetType = UNSET
    """The objects of a version in several, in order; absent if `object` is the only one."""

    @property
    def objects(self) -> tuple[StoredObject, ...]:
        """The objects whose bytes, one after another, are those of the version."""
        return (StoredObject(self.object, self.object_size),) if self.parts is UNSET else self.parts

    @property
    def full_size(self) -> int:
        """Raw bytes of all tensors, which a full copy of the version has."""
        return sum(entry.size for entry in self.tensors)

    @property
    def reversible(self) -> bool:
        """Whether the slices also lead back to the parent: a delta without dense slices."""
        return self.parent is not None and not self.encodings.get("dense")


class SealedManifest(Struct, frozen=True, forbid_unknown_fields=True):
    """The stored form of a manifest."""

    seal: str
    """blake3 of the manifest's text, hex."""
    manifest: msgspec.Raw


class _AnySchema(Struct, frozen=True):
    schema: int


class Damaged(Exception):
    """Raised if stored bytes contradict their digest or are incomplete. The error text says which."""


def version_digest(tensors: Iterable[TensorEntry]) -> str:
    """Return the digest of the weights (blake3, hex), independent of their order and encoding."""
    hasher = blake3()
    for entry in sorted(tensors, key=lambda entry: entry.name):
        hasher.update(msgspec.json.encode((entry.name, entry.dtype, entry.shape, entry.digest)))
    return hasher.hexdigest()


def parts_digest(parts: Iterable[StoredObject]) -> str:
    """Return the digest of a list of objects (blake3, hex)."""
    return blake3(msgspec.json.encode([(part.digest, part.size) for part in parts])).hexdigest()


def seal(manifest: Manifest) -> bytes:
    """Return the bytes of the manifest for the store."""
    text = msgspec.json.encode(manifest)
    return msgspec.json.encode(SealedManifest(blake3(text).hexdigest(), msgspec.Raw(text)))


def unseal(body: bytes) -> Manifest:
    """Return the manifest in these bytes. Raises Damaged."""
    try:
        sealed = msgspec.json.decode(body, type=SealedManifest)
        if blake3(bytes(sealed.manifest)).hexdigest() != sealed.seal:
            raise Damaged("the manifest contradicts its seal")
        _check_schema(msgspec.json.decode(sealed.manifest, type=_AnySchema).schema)  # first: it says which fields exist
        manifest = msgspec.json.decode(sealed.manifest, type=Manifest)
        own_digest = version_digest(manifest.tensors)
    except (msgspec.DecodeError, ValueError, OverflowError, RecursionError) as error:  # also numbers of any length
        raise Damaged(f"not a manifest: {error}") from error
    _check_encoding(manifest)
    _check_parts(manifest)
    if own_digest != manifest.digest:
        raise Damaged(f"version {manifest.version}: its digest is different from the digest of its tensors")
    return manifest


def _check_schema(schema: int) -> None:
    """Raise Damaged for a schema that this release does not read."""
    if schema not in SCHEMAS:
        raise Damaged(
            f"manifest schema {schema} is unknown; this release reads schemas 1 to {SCHEMAS[-1]}: use the release that "
            f"wrote it"
        )


def _check_parts(manifest: Manifest) -> None:
    """Raise Damaged if the parts contradict the other fields."""
    if (manifest.schema == PARTS_SCHEMA) != (manifest.parts is not UNSET):
        found = "without" if manifest.parts is UNSET else "with"
        raise Damaged(f"version {manifest.version}: its manifest has schema {manifest.schema} {found} parts")
    if manifest.parts is UNSET:
        return
    if len(manifest.parts) < 2 or any(part.size <= 0 for part in manifest.parts):
        raise Damaged(f"version {manifest.version}: its parts are fewer than two, or one of them is empty")
    if sum(part.size for part in manifest.parts) != manifest.object_size:
        raise Damaged(f"version {manifest.version}: the sizes of its parts are not {manifest.object_size} bytes in sum")
    if parts_digest(manifest.parts) != manifest.object:
        raise Damaged(f"version {manifest.version}: its object is different from the digest of its parts")


def _check_encoding(manifest: Manifest) -> None:
    """Raise Damaged if the fields about the encoding contradict each other."""
    known = ENCODINGS if manifest.schema > 1 else ENCODINGS[:1]
    if manifest.encoding not in known:
        raise Damaged(
            f"version {manifest.version}: encoding {manifest.encoding} is unknown in schema {manifest.schema}"
        )
    if (manifest.encoding == "delta") != (manifest.parent is not None):
        raise Damaged(f"version {manifest.version}: encoding {manifest.encoding} with parent {manifest.parent}")
    if manifest.parent is not None and manifest.parent.version >= manifest.version:
        raise Damaged(f"version {manifest.version}: its parent {manifest.parent.version} is not an earlier version")
