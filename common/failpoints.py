"""Places where a test makes a running service fail, by the environment variable PALIMPSEST_FAULT.

    PALIMPSEST_FAULT=learner.after_step:3         die by SIGKILL the third time this place is reached; once for
                                                  all processes, if PALIMPSEST_FAULT_ONCE names a file to remember it by
    PALIMPSEST_FAULT=learner.after_step:3:STOP    the same, but stand still (SIGSTOP) until somebody sends SIGCONT
    PALIMPSEST_FAULT=rollout.skip_head            behave wrongly there (the place asks `active`)
    PALIMPSEST_FAULT=rollout.skip_head:/FILE      the same, while this file exists

Without the variable a place costs one dictionary look-up.
"""

import os
import signal
from pathlib import Path

VARIABLE = "PALIMPSEST_FAULT"
ONCE = "PALIMPSEST_FAULT_ONCE"
_reached: dict[str, int] = {}


def active(place: str) -> bool:
    """Whether the fault of this place is switched on."""
    for fault in os.environ.get(VARIABLE, "").split(","):
        name, _, file = fault.partition(":")
        if name == place:
            return not file.startswith("/") or Path(file).exists()
    return False


def reach(place: str) -> None:
    """Die, or stand still, here if the environment says so."""
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
