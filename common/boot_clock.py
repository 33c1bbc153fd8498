"""The time since this machine started, which all its processes share and which no change of the wall clock moves."""

import time
from functools import cache
from pathlib import Path


def boot_time() -> float:
    """Return the seconds since the start of this machine, suspension included where the system counts it."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


@cache
def boot_id() -> str:
    """Return the name of this start of the machine; times of two starts cannot be compared. Empty if unknown."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
