"""Freed blocks of the C heap go back to the system."""

import ctypes

import psutil

from palimpsest.services.learner.training.host_memory import TRIM_S, HeapTrimmer, trim_heap

BLOCK, BLOCKS = 64 * 1024, 1000


def test_freed_blocks_below_a_live_one_are_returned() -> None:
    """Without trim_heap the heap keeps them: only its end shrinks by itself."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    blocks = [libc.malloc(BLOCK) for _ in range(BLOCKS)]
    for block in blocks:
        ctypes.memset(block, 1, BLOCK)
    last = libc.malloc(BLOCK)  # above all of them
    for block in blocks:
        libc.free(block)
    kept = psutil.Process().memory_full_info().uss
    trim_heap()
    returned = kept - psutil.Process().memory_full_info().uss
    libc.free(last)
    assert returned > BLOCK * BLOCKS / 2


def test_versions_that_follow_each_other_quickly_share_a_trim() -> None:
    clock = iter([0.0, TRIM_S - 1, TRIM_S, TRIM_S + 1, 2 * TRIM_S])
    heap = HeapTrimmer(clock=lambda: next(clock))
    assert [heap.after_version() for _ in range(4)] == [False, True, False, True]
