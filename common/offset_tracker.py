"""Offsets from which reading must restart so that no unresolved record is skipped. Pure."""

import heapq


class OffsetTracker:
    """Offsets read and offsets resolved, per partition.

    The frontier of a partition is its lowest offset that was read and is not resolved, or the offset after the last
    record read if all are resolved. Records below the frontier need not be read again.

    >>> frontier = OffsetTracker()
    >>> for offset in (4, 5, 6):
    ...     frontier.read(0, offset)
    >>> frontier.resolve(0, 5)
    >>> frontier.offsets()
    {0: 4}
    >>> frontier.resolve(0, 4)
    >>> frontier.offsets()
    {0: 6}
    """

    def __init__(self) -> None:
        self._open: dict[int, list[int]] = {}
        self._resolved: dict[int, set[int]] = {}
        self._next: dict[int, int] = {}

    def start(self, partition: int, offset: int) -> None:
        """Record the first offset to read of this partition."""
        self._next[partition] = offset

    def read(self, partition: int, offset: int) -> None:
        """Add a record that was read. It is unresolved."""
        heapq.heappush(self._open.setdefault(partition, []), offset)
        self._next[partition] = max(self._next.get(partition, 0), offset + 1)

    def resolve(self, partition: int, offset: int) -> None:
        """Mark the record as resolved."""
        self._resolved.setdefault(partition, set()).add(offset)

    def forget(self, partition: int) -> None:
        """Remove the partition, which now belongs to another reader."""
        for states in (self._open, self._resolved, self._next):
            states.pop(partition, None)

    def offsets(self) -> dict[int, int]:
        """Return partition -> frontier, for every partition that this reader reads."""
        frontier = {}
        for partition, following in self._next.items():
            unresolved = self._open.get(partition, [])
            resolved = self._resolved.get(partition, set())
            while unresolved and unresolved[0] in resolved:
                done = heapq.heappop(unresolved)
                if not unresolved or unresolved[0] != done:  # else it was read again, after the partition came back
                    resolved.discard(done)
            frontier[partition] = unresolved[0] if unresolved else following
        return frontier
