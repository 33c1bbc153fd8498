"""Returns freed memory of the C heap to the system.

A batch of another shape needs blocks of other sizes. The heap of glibc keeps the freed ones, so the memory of a learner
on a CPU grows for thousands of versions although nothing leaks. The next pass takes returned pages from the system
again, with a page fault for each, so the heap is not trimmed after every version of a small model.
"""

import ctypes
import time
from collections.abc import Callable
from functools import cache

TRIM_S = 10.0
"""Seconds from one trim to the next, at least."""


class HeapTrimmer:
    """Trims the heap after versions, at most once in TRIM_S."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._next = clock, clock() + TRIM_S

    def after_version(self) -> bool:
        """Trim the heap if the last trim is old enough. Return whether it did."""
        if (now := self._clock()) < self._next:
            return False
        self._next = now + TRIM_S
        trim_heap()
        return True


def trim_heap() -> None:
    """Return the freed memory of the heap to the system, if the C library can do so. Takes milliseconds."""
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@cache
def _malloc_trim() -> "ctypes._NamedFuncPointer | None":
    return getattr(ctypes.CDLL(None), "malloc_trim", None)
