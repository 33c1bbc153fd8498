"""Before which places on `old_logprobs` nothing can stand that is still wanted. Pure.

A trajectory is scored after it was sampled, and sampled after its group was offered. So what stood on the topic when a
group was offered is of other trajectories, and reading may begin where the topic ended when the oldest group that is
still open was offered.
"""

from collections import deque
from collections.abc import Mapping


class ScoreWatermarks:
    """Where the topic ended at each offer, as long as some group asks for it.

    >>> beginnings = Beginnings()
    >>> beginnings.start({0: 10})
    >>> beginnings.offer(4, {0: 120})
    >>> beginnings.offer(8, {0: 250})
    >>> beginnings.offsets(oldest=3), beginnings.offsets(oldest=7), beginnings.offsets(oldest=8)
    ({0: 10}, {0: 120}, {0: 250})
    """

    def __init__(self) -> None:
        self._ends: deque[tuple[int, Mapping[int, int]]] = deque([(0, {})])

    def start(self, offsets: Mapping[int, int]) -> None:
        """Scores of the groups that are open now stand here or later. {}: anywhere."""
        self._ends = deque([(0, offsets)])

    def offer(self, index: int, ends: Mapping[int, int]) -> None:
        """Groups from this index on are offered after the topic has ended there."""
        self._ends.append((index, ends))

    def offsets(self, oldest: int) -> dict[int, int]:
        """Partition -> offset of the first record that can be of this group, or of one offered later.

        oldest: index of the oldest open group; it never goes back.
        """
        while len(self._ends) > 1 and self._ends[1][0] <= oldest:
            self._ends.popleft()
        return dict(self._ends[0][1])
