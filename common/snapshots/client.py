"""The learner's and the workers' way to the snapshot store.

Tensors pass one at a time in both directions, so that memory holds one tensor, not one model. Every byte read is
checked against its digest before it is handed on.
"""

import os
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from types import TracebackType
from typing import IO, Self, cast

import httpx
import msgspec
from blake3 import blake3

from common.files import named
from common.snapshots.codec import Bytes, decode_base, encode_base
from common.snapshots.manifest import (
    ITEMSIZE,
    SCHEMA,
    Canary,
    Damaged,
    Manifest,
    TensorEntry,
    seal,
    unseal,
    version_digest,
)
from common.versions import Version

TRIES = 8
FIRST_PAUSE_S = 0.2
"""Before the second try; doubles, up to LONGEST_PAUSE_S."""
LONGEST_PAUSE_S = 5.0
CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class RawTensor:
    """A tensor as bytes: little-endian numbers in C order."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    raw: Bytes


class VersionMissing(LookupError):
    """The store does not hold this version (any more)."""


class VersionConflict(Exception):
    """The store already holds other weights under this number."""


class StoreUnavailable(Exception):
    """The store did not answer in the time allowed."""


class SnapshotClient:
    """Talks to one store. Belongs to one thread at a time."""

    def __init__(self, url: str, *, compression: int = 3, sleep: Callable[[float], None] = time.sleep) -> None:
        self._http = httpx.Client(base_url=url, timeout=httpx.Timeout(60.0, connect=5.0))
        self._compression = compression
        self._sleep = sleep

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Drop the connections."""
        self._http.close()

    def put(self, run: str, version: Version, tensors: Iterable[RawTensor], canaries: Sequence[Canary]) -> Manifest:
        """Store a version whole. When this returns it can be announced.

        Repeating it with the same weights is harmless. Raises VersionConflict if the number is taken by others.
        """
        with tempfile.TemporaryFile(prefix="palimpsest-put-") as temporary:
            file = cast("IO[bytes]", temporary)
            with named(tempfile.gettempdir()):
                entries, digest, size = self._encode(tensors, file)
            manifest = Manifest(
                schema=SCHEMA,
                run=run,
                version=version,
                digest=version_digest(entries),
                encoding="base",
                object=digest,
                object_size=size,
                tensors=tuple(entries),
                canaries=tuple(canaries),
            )
            reply = self._send(manifest, file)
            if reply.status_code == 424:  # the store restarted in between and swept the object away
                reply = self._send(manifest, file)
        if reply.status_code == 409:
            raise VersionConflict(reply.json()["message"])
        _expect(reply, 200, 201)
        return manifest

    def _send(self, manifest: Manifest, file: IO[bytes]) -> httpx.Response:
        self._send_object(manifest.object, manifest.object_size, file)
        return self._call(lambda: self._http.put(f"/v1/versions/{manifest.version}", content=seal(manifest)))

    def manifest(self, version: Version) -> Manifest:
        """What stands for a version. Raises VersionMissing, Damaged."""
        reply = self._call(lambda: self._http.get(f"/v1/versions/{version}"))
        if reply.status_code == 404:
            raise VersionMissing(f"version {version} is not in the store at {self._http.base_url}")
        _expect(reply, 200)
        manifest = unseal(reply.content)
        if manifest.version != version:
            raise Damaged(f"version {version} was asked for, the store gave version {manifest.version}")
        return manifest

    def versions(self) -> list[Version]:
        """Every version in the store, ascending."""
        reply = self._call(lambda: self._http.get("/v1/versions"))
        _expect(reply, 200)
        return [Version(entry["version"]) for entry in reply.json()["versions"]]

    def tensors(self, manifest: Manifest) -> Iterator[RawTensor]:
        """The version's tensors, one after another. Raises VersionMissing, Damaged."""
        with closing(self._object(manifest)) as chunks:
            waiting = _Frames(chunks, manifest)
            for entry in sorted(manifest.tensors, key=lambda entry: entry.start):
                yield _decode(entry, waiting.take(entry), manifest)

    def lease(self, holder: str, lowest: Version) -> None:
        """Keep every version from `lowest` on, until the holder names another."""
        body = msgspec.json.encode({"lowest": lowest})
        _expect(self._call(lambda: self._http.put(f"/v1/leases/{holder}", content=body)), 200)

    def _encode(self, tensors: Iterable[RawTensor], file: IO[bytes]) -> tuple[list[TensorEntry], str, int]:
        entries: list[TensorEntry] = []
        hasher, start = blake3(), 0
        for tensor in tensors:
            frame = encode_base(tensor.raw, itemsize=ITEMSIZE[tensor.dtype], level=self._compression)
            digest = blake3(tensor.raw.data).hexdigest()
            entries.append(TensorEntry(tensor.name, tensor.dtype, tensor.shape, digest, start, len(frame)))
            file.write(frame)
            hasher.update(frame)
            start += len(frame)
        return entries, hasher.hexdigest(), start

    def _send_object(self, digest: str, size: int, file: IO[bytes]) -> None:
        def send() -> httpx.Response:
            file.seek(0)
            return self._http.put(
                f"/v1/objects/{digest}",
                content=iter(lambda: file.read(CHUNK), b""),
                headers={"Content-Length": str(size)},
            )

        _expect(self._call(send), 200, 201)

    def _object(self, manifest: Manifest) -> Generator[bytes, None, None]:
        """The object's bytes. A connection that breaks is taken up where it broke: objects never change."""
        had, tries, problem = 0, 0, ""
        while tries < TRIES:
            if tries:
                self._sleep(_pause_s(tries))
            tries += 1
            try:
                with self._http.stream("GET", f"/v1/objects/{manifest.object}") as reply:
                    if reply.status_code == 404:
                        raise VersionMissing(f"version {manifest.version}: its weights are no longer in the store")
                    if reply.status_code == 200:
                        at = 0
                        for chunk in reply.iter_bytes(CHUNK):
                            new, at = chunk[max(0, had - at) :], at + len(chunk)
                            if new:
                                had, tries = had + len(new), 0
                                yield new
                        return
                    problem = str(reply.status_code)
            except httpx.TransportError as error:
                problem = f"{type(error).__name__}: {error}"
        raise StoreUnavailable(f"GET /v1/objects/{manifest.object}: no answer {TRIES} times: {problem}")

    def _call(self, send: Callable[[], httpx.Response]) -> httpx.Response:
        error: Exception | None = None
        for attempt in range(TRIES):
            if attempt:
                self._sleep(_pause_s(attempt))
            try:
                reply = send()
                if reply.status_code < 500:
                    return reply
                error = _failure(reply)
            except httpx.TransportError as broken:
                error = StoreUnavailable(f"{type(broken).__name__}: {broken}")
        if isinstance(error, OSError):
            raise error
        raise StoreUnavailable(f"the snapshot store at {self._http.base_url} did not answer {TRIES} times: {error}")


class _Frames:
    """Cuts a stream of bytes into the frames of its tensors."""

    def __init__(self, chunks: Iterator[bytes], manifest: Manifest) -> None:
        self._chunks, self._manifest = chunks, manifest
        self._held = bytearray()

    def take(self, entry: TensorEntry) -> bytes:
        try:
            while len(self._held) < entry.length:
                self._held += next(self._chunks)
        except StopIteration:
            raise Damaged(
                f"version {self._manifest.version}: the object {self._manifest.object[:12]} ends inside tensor "
                f"{entry.name}: it is truncated"
            ) from None
        frame = bytes(self._held[: entry.length])
        del self._held[: entry.length]
        return frame


def _pause_s(tries: int) -> float:
    return min(FIRST_PAUSE_S * 2.0 ** (tries - 1), LONGEST_PAUSE_S)


def _decode(entry: TensorEntry, frame: bytes, manifest: Manifest) -> RawTensor:
    try:
        raw = decode_base(frame, itemsize=ITEMSIZE[entry.dtype], size=entry.size)
    except ValueError as error:
        raise Damaged(f"version {manifest.version}, tensor {entry.name}: {error}") from error
    if blake3(raw.data).hexdigest() != entry.digest:
        raise Damaged(f"version {manifest.version}, tensor {entry.name}: its bytes contradict its digest")
    return RawTensor(entry.name, entry.dtype, entry.shape, raw)


def _failure(reply: httpx.Response) -> OSError | StoreUnavailable:
    """What a 5xx says: a full disk of the store is a full disk here, too."""
    if reply.status_code == 507:
        said = reply.json()
        return OSError(said["errno"], os.strerror(said["errno"]), said["path"])
    return StoreUnavailable(f"{reply.status_code} {reply.text[:200]}")


def _expect(reply: httpx.Response, *codes: int) -> None:
    if reply.status_code not in codes:
        raise StoreUnavailable(
            f"{reply.request.method} {reply.request.url.path}: {reply.status_code} {reply.text[:300]}"
        )
