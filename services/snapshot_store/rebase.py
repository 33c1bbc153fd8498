"""Store a version in full in place of its delta, so that the versions on which it depended can be removed.

A pin or a lease in the middle of a chain keeps the base and the deltas before it. Near the limit of bytes the store
replaces the version that gains most, if its base costs less than what the removal frees. Readers notice nothing: the
digest of a version does not depend on its encoding, and a reader whose object is gone asks for the manifest again.
"""

import asyncio
import tempfile
from collections.abc import AsyncIterator, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from msgspec import UNSET
from msgspec.structs import replace

from palimpsest.common.logs import logger
from palimpsest.common.snapshots.client import VersionMissing
from palimpsest.common.snapshots.encoding import encode_version
from palimpsest.common.snapshots.frames import Hashed
from palimpsest.common.snapshots.manifest import SCHEMA, Damaged, Manifest, Parent, version_digest
from palimpsest.common.snapshots.raw_file import RawFile
from palimpsest.common.snapshots.walker import Walker
from palimpsest.common.versions import Version
from palimpsest.services.snapshot_store.catalog import Catalog
from palimpsest.services.snapshot_store.quota import QuotaReached
from palimpsest.services.snapshot_store.retention import removable
from palimpsest.services.snapshot_store.storage import Storage

PRESSURE = 0.75
"""Share of the limit in use from which chains are replaced: the new base needs room beside the old chain."""
CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Gain:
    """A version whose chain is worth replacing."""

    version: Version
    freed: int
    """Bytes that its removal frees: the objects on which only this version depends, and its delta."""
    base: int
    """Bytes of the base of its chain, which those of the new one resemble."""


def best_gain(
    manifests: Mapping[Version, Manifest], leases: Mapping[str, Version], pinned: Collection[Version]
) -> Gain | None:
    """Return the version whose storage in full frees most beyond its cost; None if none frees more. Pure."""

    def gone(whole: Version | None) -> set[Version]:
        def parents(version: Version) -> Parent | None:
            return None if version == whole or version not in manifests else manifests[version].parent

        return removable(manifests.keys(), leases, pinned=pinned, parents=parents)

    before, found = gone(None), []
    for version, manifest in manifests.items():
        freed = gone(version) - before if manifest.parent is not None else set()
        if not freed:
            continue
        base = manifests[min(_chain(version, manifests))].object_size
        size = sum(manifests[each].object_size for each in freed) + manifest.object_size
        found.append(Gain(version, size, base))
    best = max(found, key=lambda gain: (gain.freed - gain.base, gain.version), default=None)
    return best if best is not None and best.freed > best.base else None


class Rebaser:
    """Replaces chains of a catalog, one version at a time."""

    def __init__(self, catalog: Catalog, storage: Storage, *, level: int) -> None:
        self._catalog, self._storage, self._level = catalog, storage, level
        self._given_up: set[str] = set()
        """Digests of versions that could not be rebuilt, or whose base was too large."""

    async def relieve(self) -> Version | None:
        """Replace the version that gains most, if the store is near its limit. Returns it.

        Memory: a few slices; the weights lie in a temporary file. Other requests are served meanwhile.
        """
        limit = self._catalog.max_bytes
        if limit is None or self._catalog.used_bytes < PRESSURE * limit:
            return None
        manifests = {v: m for v, m in self._catalog.versions.items() if m.digest not in self._given_up}
        gain = best_gain(manifests, self._catalog.leases, self._catalog.pins.all().keys())
        if gain is None:
            return None
        old = manifests[gain.version]
        source = _StorageSource(self._storage, manifests, asyncio.get_running_loop())
        with tempfile.TemporaryDirectory(prefix="palimpsest-rebase-") as folder:
            try:
                new = await asyncio.to_thread(_rebuild, source, old, Path(folder), self._level)
                if new.object_size >= gain.freed:
                    raise QuotaReached(f"its base has {new.object_size:,} bytes, its chain {gain.freed:,}")
                with (Path(folder) / "object").open("rb") as file:
                    await self._catalog.put_object(new.object, _pieces(file), size=new.object_size)
            except (Damaged, VersionMissing, QuotaReached) as error:
                self._given_up.add(old.digest)
                logger().warning("chain kept", version=gain.version, reason=str(error))
                return None
        if not await self._catalog.replace_version(old, new):
            return None
        logger().info("stored in full", version=gain.version, bytes=new.object_size, frees=gain.freed)
        return gain.version


class _StorageSource:
    """A VersionSource (walker.py) over the storage, for another thread than that of the event loop."""

    def __init__(
        self, storage: Storage, manifests: Mapping[Version, Manifest], loop: asyncio.AbstractEventLoop
    ) -> None:
        self._storage, self._manifests, self._loop = storage, manifests, loop

    def manifest(self, version: Version) -> Manifest:
        """See VersionSource."""
        if version not in self._manifests:
            raise VersionMissing(f"version {version} is not in the store")
        return self._manifests[version]

    @contextmanager
    def object(self, manifest: Manifest) -> Iterator[Iterator[bytes]]:
        """See VersionSource."""
        with tempfile.TemporaryFile() as file:
            copying = self._copy(manifest, file)
            try:
                asyncio.run_coroutine_threadsafe(copying, self._loop).result()
            except KeyError:
                raise VersionMissing(f"version {manifest.version}: an object is missing") from None
            file.seek(0)
            Hashed(iter(lambda: file.read(CHUNK), b""), manifest).verify()
            file.seek(0)
            yield iter(lambda: file.read(CHUNK), b"")

    async def _copy(self, manifest: Manifest, file: IO[bytes]) -> None:
        for each in manifest.objects:
            async for piece in self._storage.stream(f"objects/{each.digest}"):
                file.write(piece)


def _rebuild(source: _StorageSource, old: Manifest, folder: Path, level: int) -> Manifest:
    """Write the version's object in full to `folder`/object. Returns its manifest. Raises Damaged, VersionMissing."""
    raw = RawFile(folder / "weights")
    Walker(source, raw).move(old.version)
    with (folder / "object").open("wb") as file:
        encoded = encode_version(raw.tensors(old), None, file, level=level)
    if (found := version_digest(encoded.entries)) != old.digest:
        raise Damaged(f"version {old.version}: rebuilt with digest {found[:12]}, not {old.digest[:12]}")
    return replace(
        old,
        schema=SCHEMA,
        encoding="slices",
        object=encoded.digest,
        object_size=encoded.size,
        tensors=tuple(encoded.entries),
        parent=None,
        encodings=dict(encoded.kinds),
        parts=UNSET,
    )


def _chain(version: Version, manifests: Mapping[Version, Manifest]) -> Iterator[Version]:
    """Yield the version and those on which it depends, as far as they are known."""
    while True:
        yield version
        parent = manifests[version].parent
        if parent is None or parent.version not in manifests:
            return
        version = parent.version


async def _pieces(file: IO[bytes]) -> AsyncIterator[bytes]:
    while piece := file.read(CHUNK):
        yield piece
