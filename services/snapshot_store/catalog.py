"""The store's truth: which versions there are and who still needs them.

    objects/<blake3>             weights, named by their content
    versions/<number>.json       a sealed manifest, created once, after its object stands
    leases.json                  holder -> lowest version it may still need
    writers/, checkpoints/       see writers.py

A version exists from the moment its manifest does. Removing takes the manifest first, so that a crash leaves at worst
an object without a manifest, which the next sweep removes.
"""

import asyncio
import re
from collections.abc import AsyncIterator

import msgspec

from palimpsest.common.snapshots.manifest import Damaged, Manifest, unseal
from palimpsest.common.versions import Version
from palimpsest.services.snapshot_store.retention import removable
from palimpsest.services.snapshot_store.storage import Storage, Unavailable
from palimpsest.services.snapshot_store.writers import StaleWriter, UnknownWriter, Writers

_NUMBER = re.compile(r"versions/(\d+)\.json")


class Conflict(Exception):
    """The number belongs to other weights."""


class Catalog:
    """Versions and leases over a Storage."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._manifests: dict[Version, Manifest] = {}
        self._leases: dict[str, Version] = {}
        self._uploading: set[str] = set()
        self._changing = asyncio.Lock()
        self.writers = Writers(storage, self._changing)

    async def open(self) -> None:
        """Read what stands. Raises Damaged, naming the file, if a manifest, a commit or the leases do not hold."""
        await self.writers.open()
        for key in await self._storage.keys("versions/"):
            if match := _NUMBER.fullmatch(key):
                body = await self._storage.read(key)
                assert body is not None
                self._manifests[Version(int(match[1]))] = _standing(key, Version(int(match[1])), body)
        if (body := await self._storage.read("leases.json")) is not None:
            try:
                leases = msgspec.json.decode(body, type=dict[str, int])
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise Damaged(f"leases.json: {error}") from None
            self._leases = {holder: Version(lowest) for holder, lowest in leases.items()}

    @property
    def versions(self) -> dict[Version, Manifest]:
        """Every version, ascending."""
        return dict(sorted(self._manifests.items()))

    @property
    def leases(self) -> dict[str, Version]:
        """Holder -> lowest version it may still need."""
        return dict(self._leases)

    async def put_object(self, digest: str, chunks: AsyncIterator[bytes]) -> int:
        """Store weights under their digest; bytes. Raises DigestMismatch."""
        self._uploading.add(digest)  # a sweep must not take it for garbage before its manifest comes
        return await self._storage.put(f"objects/{digest}", chunks, digest=digest)

    async def put_version(self, manifest: Manifest, body: bytes) -> bool:
        """Make a version exist; False if it already does, equal.

        Raises Fenced, UnknownWriter, Conflict, KeyError (no such object).
        """
        async with self._changing:  # no sweep between looking for the object and standing by it, and no new writer
            try:
                await self.writers.check(manifest.writer)
            except (StaleWriter, UnknownWriter):
                self._uploading.discard(manifest.object)  # its manifest will not come
                raise
            if await self._storage.size(f"objects/{manifest.object}") != manifest.object_size:
                raise KeyError(manifest.object)
            new = await self._storage.create(_manifest_key(manifest.version), body)
            self._uploading.discard(manifest.object)  # not while the outcome is unknown: the manifest may stand
            if not new:
                standing = await self._standing(manifest.version)
                if standing.digest != manifest.digest:
                    raise Conflict(
                        f"version {manifest.version} already stands with digest {standing.digest[:16]}, not "
                        f"{manifest.digest[:16]}: versions never change; take the next number"
                    )
                return False
            self._manifests[manifest.version] = manifest
            return True

    async def _standing(self, version: Version) -> Manifest:
        if version not in self._manifests:  # stored by a try of which this process never heard the outcome
            body = await self._storage.read(_manifest_key(version))
            if body is None:
                raise Unavailable(f"{_manifest_key(version)} was there a moment ago")
            self._manifests[version] = _standing(_manifest_key(version), version, body)
        return self._manifests[version]

    async def body(self, version: Version) -> bytes | None:
        """The sealed manifest as stored, or None."""
        return await self._storage.read(_manifest_key(version))

    def object_key(self, digest: str) -> str:
        """Where an object stands."""
        return f"objects/{digest}"

    async def lease(self, holder: str, lowest: Version) -> None:
        """Note what the holder may still need, durably."""
        async with self._changing:
            self._leases[holder] = lowest
            text = msgspec.json.encode(self._leases)

            async def whole() -> AsyncIterator[bytes]:
                yield text

            await self._storage.put("leases.json", whole())

    async def sweep(self) -> list[Version]:
        """Remove what no lease needs; the versions removed."""
        async with self._changing:
            gone = sorted(removable(self._manifests.keys(), self._leases))
            for version in gone:
                await self._storage.delete(_manifest_key(version))
                del self._manifests[version]
            needed = {f"objects/{m.object}" for m in self._manifests.values()}
            needed |= {f"objects/{digest}" for digest in self._uploading}
            for key in await self._storage.keys("objects/"):
                if key not in needed:
                    await self._storage.delete(key)
            return gone


def _manifest_key(version: Version) -> str:
    return f"versions/{version:08d}.json"


def _standing(key: str, version: Version, body: bytes) -> Manifest:
    try:
        manifest = unseal(body)
    except Damaged as damage:
        raise Damaged(f"version {version} ({key}): {damage}") from None
    if manifest.version != version:
        raise Damaged(f"version {version} ({key}): the manifest in it is of version {manifest.version}")
    return manifest
