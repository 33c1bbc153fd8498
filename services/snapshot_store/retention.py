"""Decides which versions may be removed. Pure."""

from collections.abc import Callable, Collection, Mapping

from palimpsest.common.snapshots.chain import ancestors
from palimpsest.common.snapshots.manifest import Parent
from palimpsest.common.versions import Version


def removable(
    versions: Collection[Version],
    leases: Mapping[str, Version],
    *,
    pinned: Collection[Version] = (),
    parents: Callable[[Version], Parent | None] = lambda _: None,
) -> set[Version]:
    """Return the versions below every lease, except the newest, pinned ones and those on which one that stays depends.

    Without leases, no version is removable. parents: the version with which a delta begins.

    >>> sorted(removable([Version(v) for v in range(6)], {"learner": Version(4), "replica": Version(3)}))
    [0, 1, 2]
    >>> removable([Version(0), Version(1)], {})
    set()
    >>> chain = {Version(5): Parent(Version(4), ""), Version(4): Parent(Version(2), "")}
    >>> sorted(removable([Version(v) for v in range(6)], {"learner": Version(5)}, parents=chain.get))
    [0, 1, 3]
    """
    if not versions or not leases:
        return set()
    lowest = min(leases.values())
    newest = max(versions)
    stay = {version for version in versions if version >= lowest or version == newest or version in pinned}
    return set(versions) - stay - ancestors(stay, parents)
