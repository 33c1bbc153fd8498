"""Adopt the processes that a child process leaves behind, so that they can be killed (Linux).

A process that calls setsid leaves its process group, and after its parent's death it is no longer below it. If an
ancestor adopts orphans, the kernel makes them children of the nearest such ancestor, so none escapes.
"""

import ctypes
import os
import signal
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from palimpsest.common.proc_stat import stat_fields

_PR_SET_CHILD_SUBREAPER = 36
_libc = ctypes.CDLL(None)
"""Loaded at import, because loading a library after a fork is not safe."""


def adopt_orphans() -> None:
    """Become the parent of every descendant whose parent ends. Children of this process do not inherit this."""
    _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def children() -> set[int]:
    """Return the ids of the children of this process, including those that ended and are not collected."""
    own, found = os.getpid(), set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(OSError):  # it has ended
                stat = (entry / "stat").read_text(errors="replace")
                if int(stat_fields(stat)[1]) == own:
                    found.add(int(entry.name))
    return found


def kill_children(*, keep: Collection[int] = ()) -> None:
    """Kill and collect all children but those in `keep`, and all descendants that become children by that."""
    while ending := children() - set(keep):
        for pid in ending:
            kill(pid)
        for pid in ending:
            with suppress(ChildProcessError):  # collected by other code of this process
                os.waitpid(pid, 0)


def kill(pid: int) -> None:
    """Kill a process, if it is there and belongs to this user."""
    with suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGKILL)
