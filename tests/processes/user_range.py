"""User ids for the processes that a test starts as root: each test process has its own, so that runs do not disturb
each other. The kernel counts the processes of a user on the whole machine."""

import fcntl
import os
import tempfile
from pathlib import Path

LOWEST, STEP = 20_000, 2_000
"""First user id, and the number of user ids of a range. A gateway takes USERS of them, from any in the first half."""
MOST = 1_000
_locks: list[int] = []
"""Open lock files. The kernel releases the locks when this process ends, however it ends."""


def own_users() -> int | None:
    """Return the first user id of a range that no other process has; None if this process is not root."""
    if os.geteuid() != 0:
        return None
    folder = Path(tempfile.gettempdir()) / "palimpsest-test-users"
    folder.mkdir(exist_ok=True)
    numbers = range(min(MOST, (_end() - LOWEST) // STEP))
    for number in numbers:
        lock = os.open(folder / f"{number}.lock", os.O_CREAT | os.O_RDWR, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            continue
        _locks.append(lock)
        return LOWEST + number * STEP
    raise RuntimeError(f"other test processes have all {len(numbers)} ranges of user ids (locks in {folder})")


def _end() -> int:
    """The first user id that this process cannot use: a container may have few."""
    ranges = [tuple(map(int, line.split())) for line in Path("/proc/self/uid_map").read_text().splitlines()]
    return max((first + count for first, _, count in ranges if first <= LOWEST < first + count), default=65_000) - 1_000
