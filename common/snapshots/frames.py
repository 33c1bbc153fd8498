"""Decode the object of a version into tensors, one at a time. The digest of each tensor is verified."""

from collections.abc import Iterator
from dataclasses import dataclass

from blake3 import blake3

from palimpsest.common.snapshots.codec import Bytes, decode_base
from palimpsest.common.snapshots.manifest import ITEMSIZE, Damaged, Manifest, TensorEntry


@dataclass(frozen=True, slots=True)
class RawTensor:
    """A tensor as bytes: little-endian numbers in C order."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    raw: Bytes


def decode_tensors(chunks: Iterator[bytes], manifest: Manifest) -> Iterator[RawTensor]:
    """Iterate over the tensors of a version. `chunks`: the bytes of its object. Raises Damaged."""
    frames = _Frames(chunks, manifest)
    for entry in sorted(manifest.tensors, key=lambda entry: entry.start):
        yield _decode(entry, frames.take(entry), manifest)


class _Frames:
    """Splits a stream of bytes into the frames of its tensors."""

    def __init__(self, chunks: Iterator[bytes], manifest: Manifest) -> None:
        self._chunks, self._manifest = chunks, manifest
        self._buffer = bytearray()

    def take(self, entry: TensorEntry) -> bytes:
        try:
            while len(self._buffer) < entry.length:
                self._buffer += next(self._chunks)
        except StopIteration:
            raise Damaged(
                f"version {self._manifest.version}: the object {self._manifest.object[:12]} ends inside tensor "
                f"{entry.name}: it is truncated"
            ) from None
        frame = bytes(self._buffer[: entry.length])
        del self._buffer[: entry.length]
        return frame


def _decode(entry: TensorEntry, frame: bytes, manifest: Manifest) -> RawTensor:
    try:
        raw = decode_base(frame, itemsize=ITEMSIZE[entry.dtype], size=entry.size)
    except ValueError as error:
        raise Damaged(f"version {manifest.version}, tensor {entry.name}: {error}") from error
    if blake3(raw.data).hexdigest() != entry.digest:
        raise Damaged(f"version {manifest.version}, tensor {entry.name}: the digest of its bytes is different")
    return RawTensor(entry.name, entry.dtype, entry.shape, raw)
