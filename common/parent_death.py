"""Kill a process when its parent dies (Linux)."""

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)
"""Loaded at import, because loading a library between fork and exec is not safe."""


def die_with_parent(parent: int) -> None:
    """Let the kernel kill this process when the parent with this id ends."""
    on_parents_death(signal.SIGKILL)
    if os.getppid() != parent:  # the parent died before the call above
        os._exit(1)


def survive_parent() -> None:
    """Undo `die_with_parent`, for a process that detects the end of its parent in another way."""
    on_parents_death(0)


def on_parents_death(number: int) -> None:
    """Let the kernel send this signal when the thread that started this process ends; 0: no signal."""
    _libc.prctl(_PR_SET_PDEATHSIG, number)
