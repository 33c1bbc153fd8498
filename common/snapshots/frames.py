"""Decode the object of a version: into tensors one at a time, or by patching the tensors of another version in place.

The digest of each decoded tensor is verified.
"""

import os
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import accumulate
from threading import Lock

import numpy as np
from blake3 import blake3

from palimpsest.common.snapshots.codec import Bytes, decode_base
from palimpsest.common.snapshots.manifest import ITEMSIZE, Damaged, Manifest, TensorEntry
from palimpsest.common.snapshots.slices import SLICE_BYTES, Slice, apply_slice, slices_in

THREADS = os.cpu_count() or 1
VERIFIED_BYTES = 8 << 20
"""Bytes of tensors in one slice whose digests a thread computes at once: a few milliseconds of work."""
PARALLEL_BYTES = 16 * SLICE_BYTES
"""Bytes from which the slices of a tensor are worth threads. At most one such tensor awaits its digest while the next
one is patched: of weights on another device, each is a copy in host memory."""
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
    arriving: Manifest | None = None,
) -> None:
    """Apply the slices of a version to tensors in place; `back`: from the version to its parent.

    chunks: the bytes of its object, already compared with the object's digest. held: the numbers that `editing` opens;
    None: those of whole tensors. arriving: compare each patched tensor, which must be whole, with its digest in this
    manifest. The pool computes the digests while this thread patches the next slices and tensors: patching takes so
    many short steps that several threads would mostly wait for Python's lock. Only the slices of a tensor with many run
    in parallel. Raises Damaged; the tensors then may hold the bytes of no version.
    """
    digests = {entry.name: entry for entry in arriving.tensors} if arriving is not None else {}
    if arriving is not None and digests.keys() != {entry.name for entry in manifest.tensors}:
        raise Damaged(f"version {arriving.version} has other tensors than version {manifest.version}, its neighbor")
    pending: deque[Future[None]] = deque()
    patched: list[tuple[_Patch, Bytes]] = []
    followed: list[tuple[TensorEntry, _FollowingDigest]] = []
    unverified = 0
    try:
        for entry, frame in _split(chunks, manifest):
            job = _Patch(manifest, entry, frame, editing, back, held, digests.get(entry.name), arriving)
            parallel = entry.size > PARALLEL_BYTES
            digest = None
            if job.arrived is not None and entry.size > SLICE_BYTES:
                digest = _FollowingDigest(pool, pending, threads=blake3.AUTO if parallel else 1)
            raw = job.run(pool if parallel else None, digest)
            if job.arrived is not None and digest is not None:
                followed.append((job.arrived, digest))
            elif raw is not None:
                patched.append((job, raw))
                unverified += len(raw)
            if unverified >= VERIFIED_BYTES:
                pending.append(pool.submit(_verify_all, patched))
                patched, unverified = [], 0
            while len(pending) > (1 if parallel else THREADS):
                pending.popleft().result()
        half = len(patched) // 2
        pending += [pool.submit(_verify_all, part) for part in (patched[:half], patched[half:])]
    finally:
        wait(pending)
    for done in pending:
        done.result()
    for entry, digest in followed:
        assert arriving is not None
        _compare(entry, digest.found(), arriving)


class _FollowingDigest:
    """The digest of a large tensor, which a thread of the pool computes while the tensor's next slices are patched."""

    def __init__(self, pool: Executor, pending: deque[Future[None]], *, threads: int) -> None:
        """pending: gets the work on the pool."""
        self._pool, self._pending = pool, pending
        self._hasher, self._lock = blake3(max_threads=threads), Lock()
        self._final: Bytes | None = None
        """The first bytes of the tensor, which nothing changes any more; None once they are hashed."""
        self._hashed, self._works = 0, False

    def reach(self, final: Bytes) -> None:
        """Let the digest follow up to the end of these first bytes of the tensor."""
        with self._lock:
            self._final = final
            if self._works:
                return
            self._works = True
        self._pending.append(self._pool.submit(self._follow))

    def _follow(self) -> None:
        while True:
            with self._lock:
                final, self._final = self._final, None  # a copy of another device's tensor is not kept
                if final is None:
                    self._works = False
                    return
            self._hasher.update(final[self._hashed :].data)
            self._hashed = len(final)

    def found(self) -> str:
        """Return blake3 of the bytes that were reached, hex. The work on the pool has ended."""
        return self._hasher.hexdigest()


def _verify_all(patched: "list[tuple[_Patch, Bytes]]") -> None:
    for job, raw in patched:
        job.verify(raw)


@dataclass(frozen=True, slots=True)
class _Patch:
    """The change of one tensor."""

    manifest: Manifest
    entry: TensorEntry
    frame: bytes
    editing: Editing
    back: bool
    held: Held | None
    arrived: TensorEntry | None
    arriving: Manifest | None

    def run(self, pool: Executor | None, digest: _FollowingDigest | None) -> Bytes | None:
        """Apply the slices, in this thread or on the pool. Return the bytes to verify; None if no digest is given.

        digest: follows the slices. Raises Damaged.
        """
        itemsize = ITEMSIZE[self.entry.dtype]
        begin, end = (0, self.entry.size // itemsize) if self.held is None else self.held(self.entry)
        with self.editing(self.entry) as raw:

            def apply(part: Slice) -> None:
                first, last = max(part.start, begin), min(part.start + part.count, end)
                if first < last:
                    own = raw[(first - begin) * itemsize : (last - begin) * itemsize]
                    within = None if last - first == part.count else (first - part.start, last - part.start)
                    apply_slice(part, own, back=self.back, within=within)

            try:
                parts = list(slices_in(memoryview(self.frame), numbers=self.entry.size // itemsize, itemsize=itemsize))
                for part, _ in zip(parts, (pool or _SameThread()).map(apply, parts), strict=True):
                    if digest is not None:
                        digest.reach(raw[: (part.start + part.count) * itemsize])
            except ValueError as error:
                raise Damaged(f"version {self.manifest.version}, tensor {self.entry.name}: {error}") from error
        return raw if self.arrived is not None else None

    def verify(self, raw: Bytes) -> None:
        """Raise Damaged unless these are the bytes of the tensor in the version that arrives."""
        if self.arrived is not None and self.arriving is not None:
            verify(self.arrived, raw, self.arriving)


class _SameThread:
    def map(self, function: Callable[[Slice], None], items: list[Slice]) -> Iterator[None]:
        return map(function, items)


class Hashed:
    """The bytes of a version's objects, one after another, hashed as they pass."""

    def __init__(self, chunks: Iterator[bytes], manifest: Manifest) -> None:
        self._chunks, self._manifest, self._size = chunks, manifest, 0
        self._hashers = [blake3() for _ in manifest.objects]
        self._ends = list(accumulate(each.size for each in manifest.objects))

    def chunks(self) -> Iterator[bytes]:
        """Yield the bytes."""
        for chunk in self._chunks:
            self._hash(memoryview(chunk))
            yield chunk

    def verify(self) -> None:
        """Raise Damaged unless all bytes, with those that nothing has read yet, are those of the version's objects."""
        for _ in self.chunks():
            pass
        version, objects = self._manifest.version, self._manifest.objects
        if self._size < self._manifest.object_size:
            raise Damaged(
                f"version {version}: the object {self._manifest.object[:12]} has {self._size} of "
                f"{self._manifest.object_size} bytes: it is truncated"
            )
        for each, hasher in zip(objects, self._hashers, strict=True):
            if (found := hasher.hexdigest()) != each.digest:
                raise Damaged(
                    f"version {version}: the bytes of its object {each.digest[:12]} have the digest {found[:12]}"
                )

    def _hash(self, rest: memoryview) -> None:
        while rest:
            number = min(bisect_right(self._ends, self._size), len(self._ends) - 1)
            last = number == len(self._ends) - 1  # takes what is too much, so that its digest is different
            own = rest if last else rest[: self._ends[number] - self._size]
            self._hashers[number].update(own)
            self._size += len(own)
            rest = rest[len(own) :]


def joined(manifest: Manifest, body: Callable[[str], Iterator[bytes]]) -> Iterator[bytes]:
    """Yield the bytes of a version's objects, one after another. body: returns those of one, by its digest.

    Raises Damaged for a part of another size.
    """
    for each in manifest.objects:
        size = 0
        for chunk in body(each.digest):
            size += len(chunk)
            yield chunk
        if len(manifest.objects) > 1 and size != each.size:
            raise Damaged(
                f"version {manifest.version}: the object {each.digest[:12]} has {size} bytes, not {each.size}"
            )


def verify(entry: TensorEntry, raw: Bytes, manifest: Manifest) -> None:
    """Raise Damaged unless these are the tensor's bytes. The digest of a large tensor is computed on all cores."""
    threads = blake3.AUTO if len(raw) > SLICE_BYTES else 1
    _compare(entry, blake3(raw.data, max_threads=threads).hexdigest(), manifest)


def _compare(entry: TensorEntry, found: str, manifest: Manifest) -> None:
    if found != entry.digest:
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
