"""Decode the object of a version: into tensors one at a time, or by patching the tensors of another version in place.

The digest of each decoded tensor is verified.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
from blake3 import blake3

from palimpsest.common.snapshots.codec import Bytes, decode_base
from palimpsest.common.snapshots.manifest import ITEMSIZE, Damaged, Manifest, TensorEntry
from palimpsest.common.snapshots.slices import Slice, apply_slice, slices_in

Editing = Callable[[TensorEntry], AbstractContextManager[Bytes]]
"""Opens a tensor for changes: its bytes [size] uint8, writable, which count once the context ends."""


Held = Callable[[TensorEntry], tuple[int, int]]
"""Returns the [start, stop) of a tensor's numbers, in C order, that a copy of a part of the weights holds."""


@dataclass(frozen=True, slots=True)
class RawTensor:
    """A tensor as bytes: little-endian numbers in C order."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    raw: Bytes


def decode_tensors(chunks: Iterator[bytes], manifest: Manifest) -> Iterator[RawTensor]:
    """Iterate over the tensors of a version that is stored in full. `chunks`: the bytes of its object.

    Raises Damaged, and ValueError for a delta.
    """
    if manifest.parent is not None:
        raise ValueError(f"version {manifest.version} is a delta: patch the tensors of its parent")
    for entry, frame in _split(chunks, manifest):
        yield _decode(entry, frame, manifest)


def patch(
    chunks: Iterator[bytes],
    manifest: Manifest,
    editing: Editing,
    pool: Executor,
    *,
    back: bool = False,
    held: Held | None = None,
) -> None:
    """Apply the slices of a version to tensors in place; `back`: from the version to its parent.

    chunks: the bytes of its object, already compared with the object's digest. held: the numbers that `editing` opens;
    None: those of whole tensors. Slices of a tensor run in parallel. Verifies no tensor. Raises Damaged; the tensors
    then may hold the bytes of no version.
    """
    for entry, frame in _split(chunks, manifest):
        itemsize = ITEMSIZE[entry.dtype]
        begin, end = (0, entry.size // itemsize) if held is None else held(entry)
        with editing(entry) as raw:

            def apply(
                part: Slice, raw: Bytes = raw, itemsize: int = itemsize, begin: int = begin, end: int = end
            ) -> None:
                first, last = max(part.start, begin), min(part.start + part.count, end)
                if first < last:
                    own = raw[(first - begin) * itemsize : (last - begin) * itemsize]
                    apply_slice(part, own, back=back, within=(first - part.start, last - part.start))

            try:
                parts = list(slices_in(memoryview(frame), numbers=entry.size // itemsize, itemsize=itemsize))
                if len(parts) < 2:  # most tensors: without a change of thread
                    any(map(apply, parts))
                else:
                    list(pool.map(apply, parts))
            except ValueError as error:
                raise Damaged(f"version {manifest.version}, tensor {entry.name}: {error}") from error


class Hashed:
    """The bytes of an object, hashed as they pass."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks, self._hasher, self._size = chunks, blake3(), 0

    def chunks(self) -> Iterator[bytes]:
        """Yield the bytes."""
        for chunk in self._chunks:
            self._hasher.update(chunk)
            self._size += len(chunk)
            yield chunk

    def verify(self, manifest: Manifest) -> None:
        """Raise Damaged unless all bytes, with those that nothing has read yet, are the version's object."""
        for _ in self.chunks():
            pass
        if self._size < manifest.object_size:
            raise Damaged(
                f"version {manifest.version}: the object {manifest.object[:12]} has {self._size} of "
                f"{manifest.object_size} bytes: it is truncated"
            )
        if (found := self._hasher.hexdigest()) != manifest.object:
            raise Damaged(
                f"version {manifest.version}: the bytes of its object {manifest.object[:12]} have the digest "
                f"{found[:12]}"
            )


def verify(entry: TensorEntry, raw: Bytes, manifest: Manifest) -> None:
    """Raise Damaged unless these are the tensor's bytes. The digest is computed on all cores."""
    if blake3(raw.data, max_threads=blake3.AUTO).hexdigest() != entry.digest:
        raise Damaged(f"version {manifest.version}, tensor {entry.name}: the digest of its bytes is different")


def _split(chunks: Iterator[bytes], manifest: Manifest) -> Iterator[tuple[TensorEntry, bytes]]:
    """Split a stream of bytes into the frames of its tensors. Raises Damaged if it is truncated."""
    buffer = bytearray()
    for entry in sorted(manifest.tensors, key=lambda entry: entry.start):
        try:
            while len(buffer) < entry.length:
                buffer += next(chunks)
        except StopIteration:
            raise Damaged(
                f"version {manifest.version}: the object {manifest.object[:12]} ends inside tensor {entry.name}: it is "
                f"truncated"
            ) from None
        frame = bytes(buffer[: entry.length])
        del buffer[: entry.length]
        yield entry, frame


def _decode(entry: TensorEntry, frame: bytes, manifest: Manifest) -> RawTensor:
    itemsize = ITEMSIZE[entry.dtype]
    try:
        if manifest.encoding == "base":
            raw = decode_base(frame, itemsize=itemsize, size=entry.size)
        else:
            raw = np.zeros(entry.size, dtype=np.uint8)
            for part in slices_in(memoryview(frame), numbers=entry.size // itemsize, itemsize=itemsize):
                start = part.start * itemsize
                apply_slice(part, raw[start : start + part.count * itemsize])
    except ValueError as error:
        raise Damaged(f"version {manifest.version}, tensor {entry.name}: {error}") from error
    verify(entry, raw, manifest)
    return RawTensor(entry.name, entry.dtype, entry.shape, raw)
