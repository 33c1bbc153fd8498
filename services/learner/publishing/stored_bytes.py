"""Counts the bytes of the versions that the learner stores, beside full copies of them. Pure."""

from palimpsest.common.snapshots.manifest import Manifest

StoredVersions = dict[str, int]
"""`versions`, their `bytes` in the store, and `full_bytes`, those of full copies of their tensors."""


class StoredBytes:
    """The counts since the last call of `take`."""

    def __init__(self) -> None:
        self._counts = _zero()

    def add(self, manifest: Manifest) -> None:
        """Count a version."""
        self._counts["versions"] += 1
        self._counts["bytes"] += manifest.object_size
        self._counts["full_bytes"] += manifest.full_size

    def take(self) -> StoredVersions:
        """Return the counts and start again at 0."""
        counts, self._counts = self._counts, _zero()
        return counts


def _zero() -> StoredVersions:
    return {"versions": 0, "bytes": 0, "full_bytes": 0}
