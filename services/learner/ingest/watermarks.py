"""Offsets at which reading of topic `old_logprobs` may start. Pure.

A trajectory is scored after it was sampled, and sampled after its group was offered. The records that were on the topic
when a group was offered therefore belong to other groups. Reading may start where the topic ended when the oldest open
group was offered.
"""

from collections import deque
from collections.abc import Mapping


class ScoreWatermarks:
    """Keeps the end of the topic at each offer while the offered groups are open.

    >>> watermarks = ScoreWatermarks()
    >>> watermarks.start({0: 10})
    >>> watermarks.offer(4, {0: 120})
    >>> watermarks.offer(8, {0: 250})
    >>> watermarks.offsets(oldest=3), watermarks.offsets(oldest=7), watermarks.offsets(oldest=8)
    ({0: 10}, {0: 120}, {0: 250})
    """

    def __init__(self) -> None:
        self._ends: deque[tuple[int, Mapping[int, int]]] = deque([(0, {})])

    def start(self, offsets: Mapping[int, int]) -> None:
        """Set the offsets for the groups that are open now. {}: the start of the topic."""
        self._ends = deque([(0, offsets)])

    def offer(self, index: int, ends: Mapping[int, int]) -> None:
        """Note that groups from `index` on were offered when the topic ended at `ends`."""
        self._ends.append((index, ends))

    def offsets(self, oldest: int) -> dict[int, int]:
        """Partition -> offset of the first record that can belong to group `oldest` or a later one.

        oldest: index of the oldest open group. It never decreases.
        """
        while len(self._ends) > 1 and self._ends[1][0] <= oldest:
            self._ends.popleft()
        return dict(self._ends[0][1])
