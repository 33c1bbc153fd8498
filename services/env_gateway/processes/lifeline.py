"""A process that does not outlive its parent, however that one dies (Linux)."""

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1


def tie(parent: int) -> None:
    """Have the kernel kill this process when its parent, which has this id, is gone."""
    _on_parents_death(signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)


def untie() -> None:
    """Undo `tie`: this process hears of its parent's end in another way."""
    _on_parents_death(0)


def _on_parents_death(number: int) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
