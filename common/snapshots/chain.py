"""Ways along chains of versions. Pure.

A chain is a version stored in full, and deltas that each lead from the version before. A parent's number is lower than
its child's.
"""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from palimpsest.common.snapshots.manifest import Manifest, Parent
from palimpsest.common.versions import Version

BASES_WORTH = 2
"""A chain ends when its deltas together have this many times the bytes of its base. A reader from nothing then
transfers at most three bases."""
LINKS = 256
"""Maximum number of deltas in a chain: a reader from nothing asks for each manifest."""
GAIN = 0.9
"""A delta of more than this share of its base's bytes is not stored: it costs a reader more than it saves."""


@dataclass(frozen=True, slots=True)
class Leg:
    """One object to apply: load it, move forwards to its version, or back to its parent."""

    manifest: Manifest
    back: bool = False

    @property
    def loads(self) -> bool:
        """Whether the object holds every tensor in full."""
        return self.manifest.parent is None


def from_base(target: Version, manifest: Callable[[Version], Manifest]) -> list[Leg]:
    """Return the hops from nothing to a version: its base, then deltas."""
    hops = [Leg(manifest(target))]
    while (parent := hops[-1].manifest.parent) is not None:
        hops.append(Leg(manifest(parent.version)))
    return hops[::-1]


def way(held: Version | None, target: Version, manifest: Callable[[Version], Manifest]) -> list[Leg]:
    """Return the hops from the held version to another: back to their nearest common ancestor, then forwards.

    Starts from a base if the two are of different chains, or a hop back is impossible. manifest: returns that of a
    version; it is called for the versions on the way only.
    """
    if held is None:
        return from_base(target, manifest)
    back: list[Leg] = []
    forwards: list[Leg] = []
    low, high = held, target
    while low != high:
        if low > high:
            hop = Leg(manifest(low), back=True)
            if not hop.manifest.reversible:
                return from_base(target, manifest)
            back.append(hop)
            low = _parent(hop.manifest)
        else:
            hop = Leg(manifest(high))
            forwards.append(hop)
            if hop.loads:
                return from_base(target, manifest)
            high = _parent(hop.manifest)
    return back + forwards[::-1]


def order(held: Version | None, versions: Iterable[Version]) -> list[Version]:
    """Return the versions in the order that moves a copy at the held version least: to the nearer end, then across.

    >>> order(Version(5), [Version(2), Version(6), Version(4)]), order(None, [Version(2), Version(1)])
    ([6, 4, 2], [1, 2])
    """
    ascending = sorted(versions)
    if held is None or not ascending:
        return ascending
    nearer_high = abs(ascending[-1] - held) < abs(held - ascending[0])
    return ascending[::-1] if nearer_high else ascending


def ancestors(versions: Collection[Version], parents: Callable[[Version], Parent | None]) -> set[Version]:
    """Return the versions on which these depend: their parents, the parents of those, down to the bases."""
    needed: set[Version] = set()
    for version in versions:
        parent = parents(version)
        while parent is not None and parent.version not in needed:
            needed.add(parent.version)
            parent = parents(parent.version)
    return needed


@dataclass(frozen=True, slots=True)
class ChainCost:
    """The bytes of a chain so far, by which a writer decides between a delta and a new base."""

    base: int
    deltas: int = 0
    links: int = 0

    def admits(self, delta: int) -> bool:
        """Whether a delta of this many bytes costs less than a new base.

        >>> ChainCost(base=1000).admits(200), ChainCost(base=1000).admits(950), ChainCost(1000, 1900, 9).admits(200)
        (True, False, False)
        """
        return delta < GAIN * self.base and self.deltas + delta <= BASES_WORTH * self.base and self.links < LINKS

    def after(self, manifest: Manifest) -> "ChainCost":
        """Return the cost after this version, a delta on the chain or a new base."""
        if manifest.parent is None:
            return ChainCost(manifest.object_size)
        return ChainCost(self.base, self.deltas + manifest.object_size, self.links + 1)


def _parent(manifest: Manifest) -> Version:
    assert manifest.parent is not None
    return manifest.parent.version
