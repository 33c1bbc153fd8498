"""How long tests wait: for an event, and never longer than the one limit that guards against hanging."""

import time
from collections.abc import Callable

LIMIT_S = 900.0
"""Reached only if something hangs. No test passes or fails because of how long anything took."""
LOOK_S = 0.02


def until(holds: Callable[[], bool], name: str = "what the test waits for", *, tell: Callable[[], str] = str) -> None:
    """Look until it holds. Fails with `name` and what `tell` returns once LIMIT_S is over."""
    deadline = time.monotonic() + LIMIT_S
    while not holds():
        assert time.monotonic() < deadline, f"{name} did not come within {LIMIT_S:.0f} s {tell()}"
        time.sleep(LOOK_S)
