"""Fetch the objects that the next walk will probably need, while nothing else waits for the store."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from threading import Lock, Thread

from palimpsest.common.logs import logger
from palimpsest.common.snapshots.chain import way
from palimpsest.common.snapshots.manifest import Manifest
from palimpsest.common.snapshots.retrying_http import CHUNK
from palimpsest.common.snapshots.walker import VersionSource
from palimpsest.common.versions import Version

MOST_BYTES = 256 << 20
"""Default limit of the objects that are held in memory, in bytes."""


class FetchAhead:
    """A source of versions that holds some objects in memory.

    A held object is found by the digest that its manifest names, so a version that the store replaces is not affected.
    Where nothing is held, a walk downloads as without this class.
    """

    def __init__(self, store: VersionSource, *, most_bytes: int = MOST_BYTES) -> None:
        self._store, self._most_bytes = store, most_bytes
        self._lock = Lock()
        self._held: dict[str, bytes] = {}
        """Digest of an object -> its verified bytes."""
        self._thread: Thread | None = None

    def manifest(self, version: Version) -> Manifest:
        """See VersionSource."""
        return self._store.manifest(version)

    def object(self, manifest: Manifest) -> AbstractContextManager[Iterator[bytes]]:
        """See VersionSource."""
        with self._lock:
            body = self._held.get(manifest.object)
        return self._store.object(manifest) if body is None else _chunks(body)

    def begin(self, held: Version, target: Version) -> None:
        """Fetch the deltas between two versions, in a thread. Does nothing while an earlier thread is at work.

        Objects of other ways are released. Objects beyond the limit of bytes, and full versions, are left to the walk.
        A failure is logged and changes nothing else.
        """
        if self._thread is None or not self._thread.is_alive():
            self._thread = Thread(target=self._fetch, args=(held, target), name="fetch ahead", daemon=True)
            self._thread.start()

    def wait(self) -> None:
        """Wait until the thread has ended."""
        if self._thread is not None:
            self._thread.join()

    def _fetch(self, held: Version, target: Version) -> None:
        try:
            legs = [leg.manifest for leg in way(held, target, self._store.manifest)]
            wanted = [] if any(manifest.parent is None for manifest in legs) else legs
            self._release({manifest.object for manifest in wanted})
            for manifest in wanted:
                with self._lock:
                    total = sum(map(len, self._held.values())) + manifest.object_size
                    if manifest.object in self._held or total > self._most_bytes:
                        continue
                with self._store.object(manifest) as chunks:
                    body = b"".join(chunks)
                with self._lock:
                    self._held[manifest.object] = body
        except Exception as error:  # whatever it is, the walk meets it again and says what it means
            logger().debug("not fetched ahead", held=held, target=target, reason=str(error))

    def _release(self, wanted: set[str]) -> None:
        with self._lock:
            self._held = {digest: body for digest, body in self._held.items() if digest in wanted}


@contextmanager
def _chunks(body: bytes) -> Iterator[Iterator[bytes]]:
    yield (body[start : start + CHUNK] for start in range(0, len(body), CHUNK))
