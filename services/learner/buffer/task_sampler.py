"""Draws the task of the run's n-th group. Pure: the same seed and index give the same task."""

import hashlib
from collections import Counter
from collections.abc import Mapping

BLOCK = 1024
"""Number of groups between two stored counts."""


def task(seed: int, index: int, environments: Mapping[str, float]) -> tuple[str, int]:
    """Return environment and task seed of group `index`. environments: name -> weight.

    >>> task(0, 0, {"lookup": 1.0}) == task(0, 0, {"lookup": 1.0})
    True
    """
    draw = hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=16).digest()
    at = int.from_bytes(draw[:8]) / 2**64 * sum(environments.values())
    task_seed = int.from_bytes(draw[8:]) % 2**31
    for name in sorted(environments):
        at -= environments[name]
        if at < 0:
            return name, task_seed
    return max(environments), task_seed  # rounding left `at` at 0 or just above


class TaskCounter:
    """Counts the earlier groups of an environment: the seeds of `tasks.seeds = "counted"`.

    A count is a function of the group's index. Counts of every 1,024th group are kept, so that one costs at most 1,024
    draws, about a millisecond.
    """

    def __init__(self, seed: int, environments: Mapping[str, float]) -> None:
        self._seed, self._environments = seed, environments
        self._blocks: list[Counter[str]] = [Counter()]
        self._last = 0, Counter[str]()

    def before(self, index: int, environment: str) -> int:
        """Return how many groups before `index` have this environment."""
        while len(self._blocks) <= index // BLOCK:
            start = (len(self._blocks) - 1) * BLOCK
            self._blocks.append(self._blocks[-1] + self._drawn(start, start + BLOCK))
        start, counts = self._last if index // BLOCK * BLOCK <= self._last[0] <= index else self._block(index)
        counts = counts + self._drawn(start, index)
        self._last = index, counts
        return counts[environment]

    def _block(self, index: int) -> tuple[int, Counter[str]]:
        return index // BLOCK * BLOCK, self._blocks[index // BLOCK]

    def _drawn(self, start: int, end: int) -> Counter[str]:
        return Counter(task(self._seed, index, self._environments)[0] for index in range(start, end))
