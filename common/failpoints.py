"""Failpoints: places where a test makes a running service fail, selected by the environment variable PALIMPSEST_FAULT.

    PALIMPSEST_FAULT=learner.after_step:3         SIGKILL this process when it reaches the place for the third time.
                                                  If PALIMPSEST_FAULT_ONCE names a file, only the first process that
                                                  gets there is killed; the file marks it.
    PALIMPSEST_FAULT=learner.after_step:3:STOP    the same with SIGSTOP: the process stops until it gets a SIGCONT
    PALIMPSEST_FAULT=rollout.skip_head            behave wrongly there (the code checks `active`)
    PALIMPSEST_FAULT=rollout.skip_head:/FILE      the same, while this file exists

Without the variable, a failpoint costs one dictionary look-up.
"""

import os
import signal
from pathlib import Path

VARIABLE = "PALIMPSEST_FAULT"
ONCE = "PALIMPSEST_FAULT_ONCE"
_reached: dict[str, int] = {}


def active(place: str) -> bool:
    """Whether the environment switches on the fault of this place."""
    for fault in os.environ.get(VARIABLE, "").split(","):
        name, _, file = fault.partition(":")
        if name == place:
            return not file.startswith("/") or Path(file).exists()
    return False


def reach(place: str) -> None:
    """Kill or stop this process here if the environment selects this place."""
    for fault in os.environ.get(VARIABLE, "").split(","):
        name, _, how = fault.partition(":")
        count, _, end = how.partition(":")
        if name == place:
            _reached[place] = _reached.get(place, 0) + 1
            if _reached[place] == int(count or 1) and _first_time():
                os.kill(os.getpid(), signal.SIGSTOP if end == "STOP" else signal.SIGKILL)


def _first_time() -> bool:
    marker = os.environ.get(ONCE)
    if marker is None:
        return True
    try:
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True
