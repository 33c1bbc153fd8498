"""Decides which versions may be removed. Pure."""

from collections.abc import Collection, Mapping

from palimpsest.common.versions import Version


def removable(versions: Collection[Version], leases: Mapping[str, Version]) -> set[Version]:
    """Return the versions below every lease, except the newest. Without leases, no version is removable.

    >>> sorted(removable([Version(v) for v in range(6)], {"learner": Version(4), "replica": Version(3)}))
    [0, 1, 2]
    >>> removable([Version(0), Version(1)], {})
    set()
    """
    if not versions or not leases:
        return set()
    lowest = min(leases.values())
    newest = max(versions)
    return {version for version in versions if version < lowest and version != newest}
