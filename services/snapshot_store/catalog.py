"""The catalog of the store: its versions, and the leases that hold them.

    objects/<blake3>             weights, named by their content
    versions/<number>.json       a sealed manifest, created once, after its objects are stored; rebase.py may replace
                                 it by one of the same weights in full
    leases.json                  holder -> lowest version that it may still need
    pins.json                    see pins.py
    writers/, checkpoints/       see writers.py

A version exists as soon as its manifest does. The versions on which a delta depends stay as long as it does. Removal
deletes the manifest first, so that a crash leaves at worst an object without a manifest, which the next sweep deletes.
"""

import asyncio
import re
import time
from collections.abc import AsyncIterator, Callable

import msgspec

from palimpsest.common.logs import logger
from palimpsest.common.snapshots.manifest import Damaged, Manifest, Parent, seal, unseal
from palimpsest.common.versions import Version
from palimpsest.services.snapshot_store.pins import Pins
from palimpsest.services.snapshot_store.quota import Holding, Quota, QuotaReached, holdings, object_sizes, reached
from palimpsest.services.snapshot_store.retention import removable
from palimpsest.services.snapshot_store.storage import Storage, Unavailable
from palimpsest.services.snapshot_store.uploads import Uploads
from palimpsest.services.snapshot_store.writers import StaleWriter, UnknownWriter, Writers

LEASE_S = 24 * 3600.0
"""Time for which a lease holds after it was last taken, in seconds. The learner takes its lease with every version."""
_NUMBER = re.compile(r"versions/(\d+)\.json")


class UnknownParent(LookupError):
    """The store does not hold the version with which a delta begins."""


class Conflict(Exception):
    """A version with this number and other weights exists."""


class Catalog:
    """Versions and leases over a Storage.

    max_bytes: limit on the bytes of weights; None: no limit. Manifests and the bodies of log records do not count.
    A lease expires `lease_s` after it was last taken, and an object without a manifest some time after its upload. Both
    are measured by `clock`, in seconds; a restart of the store begins them again.
    """

    def __init__(
        self,
        storage: Storage,
        *,
        max_bytes: int | None = None,
        lease_s: float = LEASE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._storage, self._lease_s, self._clock = storage, lease_s, clock
        self._manifests: dict[Version, Manifest] = {}
        self._leases: dict[str, Version] = {}
        self._renewed: dict[str, float] = {}
        self._uploads = Uploads(clock=clock)
        self._quota = Quota(max_bytes)
        self._changing = asyncio.Lock()
        self.writers = Writers(storage, self._changing)
        self.pins = Pins(storage)

    async def open(self) -> None:
        """Read versions, leases and pins. Raises Damaged, with the file, if one of them or a commit is invalid."""
        await self.writers.open()
        await self.pins.open()
        for key in await self._storage.keys("versions/"):
            if match := _NUMBER.fullmatch(key):
                body = await self._storage.read(key)
                assert body is not None
                self._manifests[Version(int(match[1]))] = _read_manifest(key, Version(int(match[1])), body)
        if (body := await self._storage.read("leases.json")) is not None:
            try:
                leases = msgspec.json.decode(body, type=dict[str, int])
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise Damaged(f"leases.json: {error}") from None
            self._leases = {holder: Version(lowest) for holder, lowest in leases.items()}
            self._renewed = dict.fromkeys(self._leases, self._clock())

    @property
    def versions(self) -> dict[Version, Manifest]:
        """All versions, ascending."""
        return dict(sorted(self._manifests.items()))

    @property
    def leases(self) -> dict[str, Version]:
        """Holder -> lowest version that it may still need."""
        return dict(self._leases)

    async def put_object(self, digest: str, chunks: AsyncIterator[bytes], *, size: int | None = None) -> int:
        """Store weights under their digest. Return the number of bytes.

        size: the bytes that will arrive; it may be None without a limit. Raises DigestMismatch, QuotaReached, and
        ValueError if the weights are longer than `size`.
        """
        if self._quota.max_bytes is None:
            return await self._receive(digest, chunks)
        if size is None:
            raise ValueError("a store with a limit must know the size of an upload before it arrives")
        await self.make_room(size, digest=digest)
        try:
            return await self._receive(digest, _at_most(size, chunks))
        finally:
            self._quota.release(digest)

    async def _receive(self, digest: str, chunks: AsyncIterator[bytes]) -> int:
        with self._uploads.receiving(digest):  # a sweep must not delete it before its manifest arrives
            size = await self._storage.put(f"objects/{digest}", chunks, digest=digest)
        self._uploads.stored(digest, size)
        return size

    async def make_room(self, size: int, *, digest: str = "") -> None:
        """Remove what no lease and no pin holds if an object of this many bytes has no room otherwise.

        digest: of an upload that begins; its bytes are then reserved. Raises QuotaReached if there is no room.
        """
        async with self._changing:
            if not self._quota.fits(digest, size, self._stored()):
                await self._sweep()
            stored = self._stored()
            fits = self._quota.reserve(digest, size, stored) if digest else self._quota.fits(digest, size, stored)
            if not fits:
                assert self._quota.max_bytes is not None
                raise QuotaReached(reached(size, self.used_bytes, self._quota.max_bytes, self.holdings()))

    @property
    def max_bytes(self) -> int | None:
        """The limit on `used_bytes`."""
        return self._quota.max_bytes

    @property
    def used_bytes(self) -> int:
        """Bytes of the weights that are stored or on their way, each object counted once."""
        return self._quota.used(self._stored())

    def holdings(self) -> list[Holding]:
        """Return what each lease and pin holds; see quota.py."""
        return holdings(self._manifests, self._leases, self.pins.all())

    def _stored(self) -> dict[str, int]:
        """Object -> bytes, of versions and of uploads that wait for their manifest."""
        return self._uploads.waiting() | object_sizes(self._manifests.values())

    async def put_version(self, manifest: Manifest, body: bytes) -> bool:
        """Create a version. Return False if the same version exists.

        Raises StaleWriter, UnknownWriter, Conflict, UnknownParent, KeyError (an object that is not stored).
        """
        async with self._changing:  # no sweep and no new writer between the checks and the creation
            try:
                await self.writers.check(manifest.writer)
            except (StaleWriter, UnknownWriter):
                self._forget_uploads(manifest)  # its manifest is refused
                raise
            for each in manifest.objects:
                if await self._storage.size(f"objects/{each.digest}") != each.size:
                    raise KeyError(each.digest)
            self._check_parent(manifest)
            new = await self._storage.create(_manifest_key(manifest.version), body)
            self._forget_uploads(manifest)  # only now, because after an error the manifest may exist
            if not new:
                existing = await self._existing(manifest.version)
                if existing.digest != manifest.digest:
                    raise Conflict(
                        f"version {manifest.version} already exists with digest {existing.digest[:16]}, not "
                        f"{manifest.digest[:16]}: versions never change; take the next number"
                    )
                return False
            self._manifests[manifest.version] = manifest
            return True

    async def replace_version(self, old: Manifest, new: Manifest) -> bool:
        """Store the same weights in another encoding, whose object is stored. Return False if the version has changed.

        Raises ValueError for other weights.
        """
        if new.digest != old.digest or new.version != old.version:
            raise ValueError(f"version {old.version}: other weights, digest {new.digest[:16]}")
        async with self._changing:
            self._forget_uploads(new)
            if self._manifests.get(old.version) != old:
                return False
            await self._put_bytes(_manifest_key(old.version), seal(new))
            self._manifests[old.version] = new
            return True

    def _forget_uploads(self, manifest: Manifest) -> None:
        """Stop waiting for the manifest of its objects."""
        for each in manifest.objects:
            self._uploads.forget(each.digest)

    def _check_parent(self, manifest: Manifest) -> None:
        """Raise UnknownParent for a delta to a version that the store does not hold, or to other weights."""
        if manifest.parent is None:
            return
        parent = self._manifests.get(manifest.parent.version)
        if parent is None or parent.digest != manifest.parent.digest:
            found = f"its digest is {parent.digest[:16]}" if parent else "it is not in the store"
            raise UnknownParent(
                f"version {manifest.version} is a delta to version {manifest.parent.version} with digest "
                f"{manifest.parent.digest[:16]}, but {found}: store the version in full"
            )

    async def _existing(self, version: Version) -> Manifest:
        if version not in self._manifests:  # stored by a call whose reply was lost
            body = await self._storage.read(_manifest_key(version))
            if body is None:
                raise Unavailable(f"{_manifest_key(version)} existed a moment ago")
            self._manifests[version] = _read_manifest(_manifest_key(version), version, body)
        return self._manifests[version]

    async def body(self, version: Version) -> bytes | None:
        """Return the sealed manifest as stored, or None."""
        return await self._storage.read(_manifest_key(version))

    def object_key(self, digest: str) -> str:
        """Return the key of an object."""
        return f"objects/{digest}"

    async def lease(self, holder: str, lowest: Version) -> None:
        """Store durably the lowest version that the holder may still need."""
        async with self._changing:
            self._leases[holder] = lowest
            self._renewed[holder] = self._clock()
            await self._write_leases()

    async def release(self, holder: str) -> bool:
        """Delete a lease durably. Return whether it existed."""
        async with self._changing:
            if holder not in self._leases:
                return False
            del self._leases[holder], self._renewed[holder]
            await self._write_leases()
            return True

    async def pin(self, version: Version, name: str, *, seconds: float | None) -> float | None:
        """Keep a version, and those on which it depends; see Pins. Raises KeyError if the store does not hold it."""
        async with self._changing:  # no sweep between the check and the pin
            if version not in self._manifests:
                raise KeyError(version)
            return await self.pins.pin(version, name, seconds=seconds)

    async def unpin(self, version: Version, name: str) -> bool:
        """Release a pin durably. Return whether it existed."""
        async with self._changing:
            return await self.pins.unpin(version, name)

    async def _write_leases(self) -> None:
        await self._put_bytes("leases.json", msgspec.json.encode(self._leases))

    async def _put_bytes(self, key: str, body: bytes) -> None:
        async def whole() -> AsyncIterator[bytes]:
            yield body

        await self._storage.put(key, whole())

    async def _expire_leases(self) -> None:
        expired = [holder for holder, at in self._renewed.items() if self._clock() - at > self._lease_s]
        for holder in expired:
            logger().warning("lease expired", holder=holder, lowest=self._leases[holder])
            del self._leases[holder], self._renewed[holder]
        if expired:
            await self._write_leases()

    async def sweep(self) -> list[Version]:
        """Remove expired leases, then the versions and objects that no lease needs. Return the removed versions."""
        async with self._changing:
            return await self._sweep()

    async def _sweep(self) -> list[Version]:
        await self._expire_leases()
        gone = removable(self._manifests.keys(), self._leases, pinned=self.pins.all().keys(), parents=self._parent_of)
        for version in sorted(gone, key=self._removal_order):
            await self._storage.delete(_manifest_key(version))
            del self._manifests[version]
        needed = {f"objects/{digest}" for digest in object_sizes(self._manifests.values())}
        needed |= {f"objects/{digest}" for digest in self._uploads.awaited()}
        for key in await self._storage.keys("objects/"):
            if key not in needed:
                await self._storage.delete(key)
        return sorted(gone)

    def _removal_order(self, version: Version) -> tuple[Version, int]:
        """Chains from old to new, and in each the children first: a crash leaves no delta without its parent."""
        base = version
        while (parent := self._parent_of(base)) is not None:
            base = parent.version
        return base, -version

    def _parent_of(self, version: Version) -> Parent | None:
        manifest = self._manifests.get(version)
        return manifest.parent if manifest is not None else None


async def _at_most(size: int, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Pass the bytes on. Raises ValueError if there are more than `size`: an upload takes no more than it reserved."""
    left = size
    async for chunk in chunks:
        left -= len(chunk)
        if left < 0:
            raise ValueError(f"the upload is longer than its {size} bytes")
        yield chunk


def _manifest_key(version: Version) -> str:
    return f"versions/{version:08d}.json"


def _read_manifest(key: str, version: Version, body: bytes) -> Manifest:
    try:
        manifest = unseal(body)
    except Damaged as damage:
        raise Damaged(f"version {version} ({key}): {damage}") from None
    if manifest.version != version:
        raise Damaged(f"version {version} ({key}): its manifest belongs to version {manifest.version}")
    return manifest
