"""The limit on the bytes of weights in the store: which uploads fit, and which leases and pins hold the bytes. Pure."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from palimpsest.common.snapshots.chain import ancestors
from palimpsest.common.snapshots.manifest import Manifest, Parent
from palimpsest.common.text import count
from palimpsest.common.versions import Version
from palimpsest.services.snapshot_store.retention import removable

NO_HOLDER = {"": Version(1 << 60)}
"""Leases that hold no version. Without any lease nothing is removable."""
NAMED = 3
"""Holders that the message of QuotaReached names."""


class QuotaReached(Exception):
    """An upload does not fit, although everything removable is removed. The message says what holds the bytes."""


@dataclass(frozen=True, slots=True)
class Holding:
    """What one lease or pin holds."""

    who: str
    """The lease or the pin, with its version, for a person."""
    versions: int
    bytes: int
    """Of the objects of the versions that it holds, with those on which they depend."""
    freed: int
    """Of these, the bytes that nothing else holds."""
    release: str
    """How to release it."""


class Quota:
    """A limit on stored bytes and those that uploads in progress will store. Not thread-safe.

    >>> quota = Quota(10)
    >>> quota.reserve("a", 5, {"b": 5}), quota.reserve("c", 1, {"b": 5})
    (True, False)
    """

    def __init__(self, max_bytes: int | None) -> None:
        self.max_bytes = max_bytes
        """The limit in bytes; None: no limit."""
        self._reserved: dict[str, int] = {}

    def used(self, stored: Mapping[str, int]) -> int:
        """Return the bytes in use. `stored`: object -> bytes. An object that is sent again counts once."""
        arriving = sum(size for digest, size in self._reserved.items() if digest not in stored)
        return sum(stored.values()) + arriving

    def fits(self, digest: str, size: int, stored: Mapping[str, int]) -> bool:
        """Whether this object has room."""
        counted = digest in stored or digest in self._reserved
        return self.max_bytes is None or counted or self.used(stored) + size <= self.max_bytes

    def reserve(self, digest: str, size: int, stored: Mapping[str, int]) -> bool:
        """Count an upload that begins, if it has room. Return whether it has."""
        if not self.fits(digest, size, stored):
            return False
        self._reserved[digest] = max(self._reserved.get(digest, 0), size)
        return True

    def release(self, digest: str) -> None:
        """Stop counting an upload: it is stored, or it failed."""
        self._reserved.pop(digest, None)


def object_sizes(manifests: Iterable[Manifest]) -> dict[str, int]:
    """Return the objects of versions and their bytes."""
    return {each.digest: each.size for manifest in manifests for each in manifest.objects}


def holdings(
    manifests: Mapping[Version, Manifest], leases: Mapping[str, Version], pins: Mapping[Version, Collection[str]]
) -> list[Holding]:
    """Return what each lease and each pin holds, those first whose release frees most.

    Nothing before the first lease, because until then no version is removable.
    """
    if not leases:
        return []

    def parents(version: Version) -> Parent | None:
        return manifests[version].parent if version in manifests else None

    def held(versions: Iterable[Version]) -> tuple[int, int]:
        own = set(versions) & manifests.keys()
        own |= ancestors(own, parents) & manifests.keys()
        return len(own), _bytes(manifests[version] for version in own)

    def left(leases: Mapping[str, Version], pinned: Collection[Version]) -> int:
        gone = removable(manifests.keys(), leases or NO_HOLDER, pinned=pinned, parents=parents)
        return _bytes(manifest for version, manifest in manifests.items() if version not in gone)

    now, found = left(leases, pins.keys()), []
    for name, lowest in leases.items():
        versions, size = held(version for version in manifests if version >= lowest)
        others = {other: low for other, low in leases.items() if other != name}
        release = f"DELETE /v1/leases/{name} if its holder has gone (a lease ends by itself after a day)"
        who = f"lease {name} from version {lowest}"
        found.append(Holding(who, versions, size, now - left(others, pins.keys()), release))
    for pinned, names in pins.items():
        versions, size = held([pinned])
        others_pinned = [version for version in pins if version != pinned or len(names) > 1]
        freed = now - left(leases, others_pinned)
        found += [
            Holding(
                f"pin {name} of version {pinned}", versions, size, freed,
                f"palimpsest pin RUN {pinned} --name={name} --release",
            )
            for name in names
        ]  # fmt: skip
    return sorted(found, key=lambda holding: (-holding.freed, -holding.bytes, holding.who))


def reached(needed: int, used: int, max_bytes: int, held: list[Holding]) -> str:
    """Return the sentence for a person: what is needed, what holds the bytes, and what frees them."""
    text = f"the snapshot store is at its limit: {used:,} of {max_bytes:,} bytes are in use, and {needed:,} more are "
    text += "needed. "
    if needed > max_bytes:
        return text + "They never fit: raise snapshot_store.max_gib and start the store again"
    if not held:
        return (
            text
            + "There is no lease yet, so nothing is removed: raise snapshot_store.max_gib and start the store again"
        )
    parts = [
        f"{holding.who} holds {count(holding.versions, 'version')}, {holding.bytes:,} bytes, and "
        f"{holding.freed:,} of them alone: {holding.release}"
        for holding in held[:NAMED]
    ]
    more = f"; and {len(held) - NAMED} more" if len(held) > NAMED else ""
    return text + "; ".join(parts) + more + ". Or raise snapshot_store.max_gib and start the store again"


def _bytes(manifests: Iterable[Manifest]) -> int:
    """Bytes of the objects, each counted once."""
    return sum(object_sizes(manifests).values())
