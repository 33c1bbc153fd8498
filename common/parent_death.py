"""A process that does not outlive its parent, however that one dies (Linux)."""

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)
"""Loaded here: between fork and exec is no time for it."""


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent, which has this id, is gone."""
    on_parents_death(signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)


def survive_parent() -> None:
    """Undo `tie`: this process hears of its parent's end in another way."""
    on_parents_death(0)


def on_parents_death(number: int) -> None:
    """Have the kernel send this process a signal when the thread that started it is gone; 0: none."""
    _libc.prctl(_PR_SET_PDEATHSIG, number)
