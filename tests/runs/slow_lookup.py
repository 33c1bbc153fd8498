"""lookup with a tool that takes as long as tools do: a plugin for runs in which trajectories outlive versions."""

import time

from palimpsest.env import Outcome, Turn
from palimpsest.services.env_gateway.environments.lookup import Lookup

TOOL_S = 1.5
"""Several steps of a small learner, also on a slow machine."""


class SlowLookup(Lookup):
    """The tasks and rewards of lookup."""

    def step(self, turn: Turn) -> Outcome:
        """Answers at once, looks a value up after `TOOL_S` seconds."""
        if turn.answer is None:
            time.sleep(TOOL_S)
        return super().step(turn)
