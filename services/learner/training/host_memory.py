"""Returns freed memory of the C heap to the system.

A batch of another shape needs blocks of other sizes. The heap of glibc keeps the freed ones, so the memory of a learner
on a CPU grows for thousands of versions although nothing leaks.
"""

import ctypes
from functools import cache


def trim_heap() -> None:
    """Return the freed memory of the heap to the system, if the C library can do so. Takes milliseconds."""
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@cache
def _malloc_trim() -> "ctypes._NamedFuncPointer | None":
    return getattr(ctypes.CDLL(None), "malloc_trim", None)
