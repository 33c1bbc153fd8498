"""Where reading has to start again so that nothing unresolved is missed. Pure."""

import heapq


class OffsetTracker:
    """Offsets read and offsets resolved, per partition.

    The frontier of a partition is its lowest offset that was read and is not resolved, or the offset after the last
    one read. Everything below it is done with for ever.

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
        """Reading of this partition begins here."""
        self._next[partition] = offset

    def read(self, partition: int, offset: int) -> None:
        """A record was read; it is unresolved."""
        heapq.heappush(self._open.setdefault(partition, []), offset)
        self._next[partition] = max(self._next.get(partition, 0), offset + 1)

    def resolve(self, partition: int, offset: int) -> None:
        """The record needs no further attention."""
        self._resolved.setdefault(partition, set()).add(offset)

    def forget(self, partition: int) -> None:
        """Another reader has this partition now."""
        for states in (self._open, self._resolved, self._next):
            states.pop(partition, None)

    def offsets(self) -> dict[int, int]:
        """Partition -> frontier, for every partition read from."""
        frontier = {}
        for partition, following in self._next.items():
            unresolved = self._open.get(partition, [])
            resolved = self._resolved.get(partition, set())
            while unresolved and unresolved[0] in resolved:
                resolved.discard(heapq.heappop(unresolved))
            frontier[partition] = unresolved[0] if unresolved else following
        return frontier
