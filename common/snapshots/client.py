"""Client of the snapshot store, for the learner and the workers.

The client transfers one tensor at a time in both directions, so that memory holds one tensor and not a model. It
verifies the digest of every tensor before it returns the tensor.
"""

import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self, cast

import httpx
import msgspec
from blake3 import blake3

from palimpsest.common import failpoints
from palimpsest.common.bus.claim_check import MOST_CLAIM_BYTES
from palimpsest.common.files import with_filename
from palimpsest.common.snapshots.adapter import Adapter
from palimpsest.common.snapshots.chain import ChainCost
from palimpsest.common.snapshots.codec import Bytes
from palimpsest.common.snapshots.encoding import EncodedVersion, encode_version
from palimpsest.common.snapshots.fencing import raise_if_refused
from palimpsest.common.snapshots.frames import Hashed, RawTensor, decode_tensors, joined
from palimpsest.common.snapshots.manifest import Canary, Damaged, Manifest, Parent, seal, unseal
from palimpsest.common.snapshots.retrying_http import (
    CHUNK,
    NotFound,
    RetryingHttp,
    StoreUnavailable,
    Upload,
    WithoutRoom,
    raise_for_status,
    timeout_of,
)
from palimpsest.common.versions import Version

__all__ = [
    "ClaimMissing",
    "ObjectMissing",
    "ParentMissing",
    "ParentWeights",
    "RawTensor",
    "SnapshotClient",
    "StoreUnavailable",
    "VersionConflict",
    "VersionMissing",
    "WithoutRoom",
]

MOST_IN_MEMORY = 64 << 20
"""Size up to which a downloaded object stays in memory, in bytes. A larger one goes to a temporary file."""
PATIENCE_S = 120.0
"""Maximum outage of the store, or of the S3 behind it, that a call survives, in seconds."""


class VersionMissing(LookupError):
    """Raised if the store does not hold this version."""


class VersionConflict(Exception):
    """Raised if the store already holds other weights under this version number."""


class ObjectMissing(StoreUnavailable):
    """Raised if the store does not hold an object that a manifest names."""


class ParentMissing(LookupError):
    """Raised if the store does not hold the version that a delta begins with."""


@dataclass(frozen=True, slots=True)
class ParentWeights:
    """A stored version that a delta may begin with."""

    parent: Parent
    raw: Mapping[str, Bytes]
    """Name -> bytes of every tensor."""
    cost: ChainCost
    """Of the chain that ends with this version."""


MISSING: Mapping[str, type[ObjectMissing | ParentMissing]] = {
    "object_missing": ObjectMissing,
    "parent_missing": ParentMissing,
}
"""Code of a refused manifest -> error."""


class ClaimMissing(LookupError):
    """Raised if the store does not hold this body."""


class SnapshotClient:
    """Client of one store. Thread-safe.

    `patience_s`: time for which a call retries if the store does not answer, in seconds. `ca_file`: CA certificates
    that verify the store and the S3 to which the store redirects readers. `sleep_without_room`: pauses while the store
    is at its limit of bytes, which may take hours; it may raise. Default: `sleep`.
    """

    def __init__(
        self,
        url: str,
        *,
        compression: int = 3,
        ca_file: Path | None = None,
        patience_s: float = PATIENCE_S,
        sleep: Callable[[float], None] = time.sleep,
        sleep_without_room: Callable[[float], None] | None = None,
    ) -> None:
        self._calls = RetryingHttp(
            url, patience_s=patience_s, ca_file=ca_file, sleep=sleep, sleep_without_room=sleep_without_room
        )
        self._compression, self._ca_file = compression, ca_file

    @property
    def compression(self) -> int:
        """zstd level of weights in full."""
        return self._compression

    @property
    def url(self) -> str:
        """URL of the store."""
        return self._calls.url

    def with_patience(self, patience_s: float) -> "SnapshotClient":
        """Return another client of the same store, which retries for this time. The caller closes it."""
        return SnapshotClient(self.url, compression=self._compression, ca_file=self._ca_file, patience_s=patience_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._calls.close()

    def put(
        self,
        run: str,
        version: Version,
        tensors: Iterable[RawTensor],
        canaries: Sequence[Canary],
        *,
        writer: int,
        parent: ParentWeights | None = None,
        adapter: Adapter | None = None,
    ) -> Manifest:
        """Store a version. After the return it is complete and may be announced.

        parent: the previous version, with its bytes; the version is then stored as a delta to it if that costs less.
        `tensors` is then iterated a second time otherwise. adapter: what the tensors are; None: whole weights.

        A repeat with the same weights has no effect. Raises VersionConflict if the store holds other weights under this
        number, ParentMissing if the store does not hold the parent, and Fenced if there is a newer writer than
        `writer`.
        """
        with tempfile.TemporaryFile(prefix="palimpsest-put-") as temporary:
            file = cast("IO[bytes]", temporary)
            with with_filename(tempfile.gettempdir()):
                encoded, parent = self._encode(tensors, parent, file)
            before = None if parent is None else parent.parent
            manifest = encoded.manifest(run, version, canaries, writer=writer, parent=before, adapter=adapter)
            failpoints.reach("learner.after_encoding")
            try:
                self._send(manifest, file)
            except ObjectMissing:  # the store restarted after the first call and removed the object
                self._send(manifest, file)
        return manifest

    def _send(self, manifest: Manifest, file: IO[bytes]) -> None:
        while True:
            try:
                self.send_object(manifest.object, manifest.object_size, file)
                break
            except WithoutRoom:
                self.wait_for_room(manifest.object_size)
        failpoints.reach("learner.after_storing_object")
        self.put_manifest(manifest)

    def put_manifest(self, manifest: Manifest) -> None:
        """Create a version whose objects are stored. Raises as `put`, and ObjectMissing."""
        reply = self._calls.call(lambda http: http.put(f"/v1/versions/{manifest.version}", content=seal(manifest)))
        if (code := _code(reply)) in MISSING:
            raise MISSING[code](reply.json()["message"])
        raise_if_refused(reply)
        if reply.status_code == 409:
            raise VersionConflict(reply.json()["message"])
        raise_for_status(reply, 200, 201)

    def manifest(self, version: Version) -> Manifest:
        """Return the manifest of a version. Raises VersionMissing, Damaged."""
        reply = self._calls.call(lambda http: http.get(f"/v1/versions/{version}"))
        if reply.status_code == 404:
            raise VersionMissing(f"version {version} is not in the store at {self._calls.url}")
        raise_for_status(reply, 200)
        manifest = unseal(reply.content)
        if manifest.version != version:
            raise Damaged(f"requested version {version}, but the store returned version {manifest.version}")
        return manifest

    def versions(self) -> list[Version]:
        """Return every version in the store, in ascending order."""
        reply = self._calls.call(lambda http: http.get("/v1/versions"))
        raise_for_status(reply, 200)
        return [Version(entry["version"]) for entry in reply.json()["versions"]]

    def newest_version(self) -> Version:
        """Return the newest version in the store; -1 before the first one."""
        return max(self.versions(), default=Version(-1))

    def newest_writer(self) -> int:
        """Return the epoch of the newest learner; 0 before the first one."""
        return int(self.request("GET", "/v1/writers")["epoch"] or 0)

    def tensors(self, manifest: Manifest) -> Iterator[RawTensor]:
        """Iterate over the tensors of a version that is stored in full. Raises VersionMissing, Damaged."""
        with closing(self._object(manifest)) as chunks:
            hashed = Hashed(chunks, manifest)
            yield from decode_tensors(hashed.chunks(), manifest)
            hashed.verify()

    @contextmanager
    def object(self, manifest: Manifest) -> Iterator[Iterator[bytes]]:
        """Download the objects of a version and compare them with their digests; yield their bytes in pieces.

        Raises VersionMissing, Damaged. Memory holds at most MOST_IN_MEMORY bytes of it.
        """
        with tempfile.SpooledTemporaryFile(max_size=MOST_IN_MEMORY, prefix="palimpsest-get-") as file:
            with closing(self._object(manifest)) as chunks:
                hashed = Hashed(chunks, manifest)
                for chunk in hashed.chunks():
                    file.write(chunk)
            hashed.verify()
            file.seek(0)
            yield iter(lambda: file.read(CHUNK), b"")

    def lease(self, holder: str, lowest: Version) -> None:
        """Retain every version from `lowest` on. A later call of the same holder replaces this lease."""
        body = msgspec.json.encode({"lowest": lowest})
        raise_for_status(self._calls.call(lambda http: http.put(f"/v1/leases/{holder}", content=body)), 200)

    def request(self, method: str, path: str, body: Mapping[str, str] | None = None) -> Any:
        """Send a request about writers or checkpoints and return the decoded reply. Raises Fenced."""
        content = b"" if body is None else msgspec.json.encode(body)
        reply = self._calls.call(lambda http: http.request(method, path, content=content))
        raise_if_refused(reply)
        raise_for_status(reply, 200, 201)
        return reply.json()

    def take_name(self, role: str, name: str, body: Mapping[str, str]) -> dict[str, Any]:
        """Take or renew the name of a worker or replica. Returns the reply; without `lease_s` another one holds it."""
        content = msgspec.json.encode(body)
        reply = self._calls.call(lambda http: http.put(f"/v1/members/{role}/{name}", content=content))
        raise_for_status(reply, 200, 409)
        answer: dict[str, Any] = reply.json()
        return answer

    def free_name(self, role: str, name: str, instance: str) -> None:
        """Free a name, if this instance holds it."""
        path = f"/v1/members/{role}/{name}"
        raise_for_status(self._calls.call(lambda http: http.delete(path, params={"instance": instance})), 204)

    def put_claim(self, body: bytes) -> str:
        """Store the body of a long record. Returns its digest, the argument of `claim`.

        A repeat with the same bytes only restarts their retention time.
        """
        digest = blake3(body).hexdigest()
        raise_for_status(self._calls.call(lambda http: http.put(f"/v1/claims/{digest}", content=body)), 201)
        return digest

    def claim(self, digest: str) -> bytes:
        """Return the body with this digest. Raises ClaimMissing, Damaged."""
        try:
            body = bytearray()
            for part in self._calls.body(f"/v1/claims/{digest}"):
                body += part
                if len(body) > MOST_CLAIM_BYTES:
                    raise Damaged(f"body {digest[:12]}: longer than {MOST_CLAIM_BYTES} bytes, the limit of a record")
        except NotFound:
            raise ClaimMissing(f"the body {digest} is not in the store at {self._calls.url}") from None
        if blake3(body).hexdigest() != digest:
            raise Damaged(f"body {digest[:12]}: the digest of its {len(body)} bytes is different")
        return bytes(body)

    def _encode(
        self, tensors: Iterable[RawTensor], parent: ParentWeights | None, file: IO[bytes]
    ) -> tuple[EncodedVersion, ParentWeights | None]:
        """Write the object: a delta to the parent if it costs less than a base. Returns the parent of the object."""
        if parent is not None:
            encoded = encode_version(tensors, parent.raw, file, level=self._compression)
            if parent.cost.admits(encoded.size):
                return encoded, parent
            file.seek(0)
            file.truncate()
        return encode_version(tensors, None, file, level=self._compression), None

    def send_object(self, digest: str, size: int, file: IO[bytes]) -> None:
        """Store the bytes of a file as an object. Raises WithoutRoom if the store is at its limit of bytes."""
        upload = Upload(file)

        def send(http: httpx.Client) -> httpx.Response:
            return http.put(
                f"/v1/objects/{digest}",
                content=upload.chunks(),
                headers={"Content-Length": str(size)},
                timeout=timeout_of(size),  # after the last byte, the store writes the object to its disk or its S3
            )

        raise_for_status(self._calls.call(send, upload=upload), 200, 201)

    def wait_for_room(self, size: int) -> None:
        """Return when the store has room for this many bytes."""
        self._calls.wait_for_room(size)

    def _object(self, manifest: Manifest) -> Generator[bytes, None, None]:
        try:
            yield from joined(manifest, lambda digest: self._calls.body(f"/v1/objects/{digest}"))
        except NotFound:
            raise VersionMissing(f"version {manifest.version}: the store no longer holds its weights") from None


def _code(reply: httpx.Response) -> str:
    """The code of a reply with status 424; empty for others."""
    return str(reply.json()["code"]) if reply.status_code == 424 else ""
