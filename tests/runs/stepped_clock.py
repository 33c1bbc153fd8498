"""python -m tests.runs.stepped_clock FILE -m MODULE ARGUMENTS...

Runs the module with a wall clock that is off by the number of seconds in FILE, which may change while it runs. Python
code sees the step in `time.time`, with every library that asks it; the kernel's clock needs privileges.
"""

import runpy
import sys
import time
from pathlib import Path

OFFSET = Path(sys.argv[1])
_kernel = time.time


def _stepped() -> float:
    try:
        return _kernel() + float(OFFSET.read_text())
    except (OSError, ValueError):  # not there yet, or half written
        return _kernel()


if __name__ == "__main__":
    time.time = _stepped
    sys.argv = sys.argv[3:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
