"""Plugin: lookup with a slow tool, for runs whose trajectories span several versions."""

import time

from palimpsest.common.environments.lookup import Lookup
from palimpsest.env import Outcome, Turn

TOOL_S = 1.5
"""Seconds: several optimizer steps of a small learner, even on a slow machine."""


class SlowLookup(Lookup):
    """Lookup with a slow tool; tasks and rewards are unchanged."""

    def step(self, turn: Turn) -> Outcome:
        """Take an answer at once, and look a value up after `TOOL_S` seconds."""
        if turn.answer is None:
            time.sleep(TOOL_S)
        return super().step(turn)
