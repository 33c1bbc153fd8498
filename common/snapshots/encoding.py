"""Encode the tensors of a version into an object, in slices, on all cores; or into several, each with other tensors.

Memory holds the tensors that the caller yields and a few encoded slices, not the object.
"""

import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import IO

from blake3 import blake3
from msgspec import UNSET
from msgspec.structs import replace

from palimpsest.common.snapshots.adapter import Adapter
from palimpsest.common.snapshots.codec import Bytes
from palimpsest.common.snapshots.frames import RawTensor
from palimpsest.common.snapshots.manifest import (
    ITEMSIZE,
    PARTS_SCHEMA,
    SCHEMA,
    Canary,
    Manifest,
    Parent,
    StoredObject,
    TensorEntry,
    parts_digest,
    version_digest,
)
from palimpsest.common.snapshots.slices import Slice, encode_slice, ranges
from palimpsest.common.versions import Version

THREADS = os.cpu_count() or 1
AHEAD = 4
"""Slices that each thread may have waiting to be written. They bound the memory."""


@dataclass
class EncodedVersion:
    """What is known of an object after it was written."""

    entries: list[TensorEntry] = field(default_factory=list)
    digest: str = ""
    """blake3 of the object, hex."""
    size: int = 0
    """Bytes of the object."""
    kinds: dict[str, int] = field(default_factory=dict)
    """Kind of slice, in small letters -> number of slices."""
    parts: tuple[StoredObject, ...] = ()
    """The objects if they are several; `digest` is then that of the list."""

    def manifest(
        self,
        run: str,
        version: Version,
        canaries: Sequence[Canary],
        *,
        writer: int,
        parent: Parent | None,
        adapter: Adapter | None,
    ) -> Manifest:
        """Return the manifest of the version. parent: of a delta; None: the version is encoded in full."""
        return Manifest(
            schema=PARTS_SCHEMA if self.parts else SCHEMA,
            run=run,
            writer=writer,
            version=version,
            digest=version_digest(self.entries),
            encoding="slices" if parent is None else "delta",
            object=self.digest,
            object_size=self.size,
            tensors=tuple(self.entries),
            canaries=tuple(canaries),
            parent=parent,
            encodings=self.kinds,
            adapter=UNSET if adapter is None else adapter,
            parts=self.parts or UNSET,
        )


def encode_version(
    tensors: Iterable[RawTensor],
    parent: Mapping[str, Bytes] | None,
    file: IO[bytes],
    *,
    level: int,
    threads: int = THREADS,
) -> EncodedVersion:
    """Write the object of a version to the file.

    parent: the bytes of each tensor of the parent version by name; None: write a base. level: zstd level of slices in
    full. Raises ValueError if the parent has other tensors.
    """
    writer = _Writer(file)
    with ThreadPoolExecutor(threads, thread_name_prefix="encode") as pool:
        pending: deque[tuple[Future[Slice | str], Callable[[Slice | str], None]]] = deque()

        def write_oldest() -> None:
            future, write = pending.popleft()
            write(future.result())

        for tensor in tensors:
            itemsize, old = ITEMSIZE[tensor.dtype], None
            if parent is not None and ((old := parent.get(tensor.name)) is None or len(old) != len(tensor.raw)):
                raise ValueError(f"the parent version has no tensor {tensor.name} of {len(tensor.raw)} bytes")
            for start, stop in ranges(len(tensor.raw) // itemsize, itemsize):
                part = slice(start * itemsize, stop * itemsize)
                before = None if old is None else old[part]
                pending.append(
                    (
                        pool.submit(
                            encode_slice, tensor.raw[part], before, itemsize=itemsize, start=start, level=level
                        ),
                        writer.write_slice,
                    )
                )
                while len(pending) > AHEAD * threads:
                    write_oldest()
            pending.append((pool.submit(digest_of, tensor.raw), writer.ending(tensor)))
        while pending:
            write_oldest()
    return writer.finished()


def join(encoded: Sequence[EncodedVersion]) -> EncodedVersion:
    """Return a version whose tensors are encoded in several objects, in their order. Objects without bytes are left
    out.

    >>> one = EncodedVersion([TensorEntry("a", "int8", (1,), "", 0, 5)], digest="d", size=5)
    >>> two = EncodedVersion([TensorEntry("b", "int8", (1,), "", 0, 7)], digest="e", size=7)
    >>> both = join([one, EncodedVersion(), two])
    >>> both.size, [(entry.name, entry.start) for entry in both.entries], [part.digest for part in both.parts]
    (12, [('a', 0), ('b', 5)], ['d', 'e'])
    """
    version, parts = EncodedVersion(), []
    for each in encoded:
        version.entries += [replace(entry, start=entry.start + version.size) for entry in each.entries]
        version.size += each.size
        version.kinds = {
            kind: version.kinds.get(kind, 0) + each.kinds.get(kind, 0) for kind in {**version.kinds, **each.kinds}
        }
        if each.size:
            parts.append(StoredObject(each.digest, each.size))
    if len(parts) == 1:
        version.digest = parts[0].digest
    else:
        version.digest, version.parts = parts_digest(parts), tuple(parts)
    return version


def digest_of(raw: Bytes) -> str:
    """Return blake3 of the bytes, hex."""
    return blake3(raw.data).hexdigest()


class _Writer:
    """Writes slices one after another, and the entry of each tensor."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._hasher, self._tensor_start = file, blake3(), 0
        self._version, self._kinds = EncodedVersion(), Counter[str]()

    def write_slice(self, encoded: Slice | str) -> None:
        assert isinstance(encoded, Slice)
        body = encoded.encoded()
        self._file.write(body)
        self._hasher.update(body)
        self._version.size += len(body)
        self._kinds[encoded.kind.name.lower()] += 1

    def ending(self, tensor: RawTensor) -> Callable[[Slice | str], None]:
        name, dtype, shape = tensor.name, tensor.dtype, tensor.shape

        def end(digest: Slice | str) -> None:
            assert isinstance(digest, str)
            start, self._tensor_start = self._tensor_start, self._version.size
            self._version.entries.append(TensorEntry(name, dtype, shape, digest, start, self._version.size - start))

        return end

    def finished(self) -> EncodedVersion:
        self._version.digest, self._version.kinds = self._hasher.hexdigest(), dict(self._kinds)
        return self._version
