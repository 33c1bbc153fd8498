"""Waiting for events in tests, with one limit for all tests that only guards against hanging."""

import time
from collections.abc import Callable

LIMIT_S = 900.0
"""Seconds. Reached only if something hangs; no test result depends on a duration."""
LOOK_S = 0.02


def until(holds: Callable[[], bool], name: str = "what the test waits for", *, tell: Callable[[], str] = str) -> None:
    """Wait until holds() is true. After LIMIT_S, fail with `name` and the text of `tell`."""
    deadline = time.monotonic() + LIMIT_S
    while not holds():
        assert time.monotonic() < deadline, f"{name} did not happen within {LIMIT_S:.0f} s {tell()}"
        time.sleep(LOOK_S)
