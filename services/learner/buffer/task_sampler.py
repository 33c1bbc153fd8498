"""Draws the task of the run's n-th group. Pure: the same seed and index give the same task."""

import hashlib
from collections.abc import Mapping


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
