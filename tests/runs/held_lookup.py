"""Plugin: lookup whose tool waits for versions, for runs whose trajectories must span several versions on any machine.

One tool call of the run waits at a time, until two more versions were trained. The other trajectories continue, so the
learner always gets its batches. By then the first of the two versions was published, so the rest of the trajectory has
another version than its beginning, and a cut between them flushes it.
"""

import fcntl
import os
import time
from pathlib import Path

from palimpsest.common.environments.lookup import Lookup
from palimpsest.env import Outcome, Turn
from tests.processes.waiting import LIMIT_S, LOOK_S

VARIABLE = "HELD_RUN"
"""Environment variable with the folder of the run."""
VERSIONS = 2


FLAGS = (
    '--env_gateway.plugins={held_lookup = "tests.runs.held_lookup:HeldLookup"}',
    f'--env_gateway.plugin_variables=["{VARIABLE}"]',
    f"--env_gateway.step_limit_s={LIMIT_S}",
    f"--env_gateway.remember_s={LIMIT_S}",
    f"--tasks.time_limit_s={2 * LIMIT_S}",
    "--tasks.environments={held_lookup = 1.0}",
)
"""Flags of a run with this environment only."""


class HeldLookup(Lookup):
    """Lookup with a tool that waits; tasks and rewards are unchanged."""

    def step(self, turn: Turn) -> Outcome:
        """Take an answer at once; look a value up after the wait, if no other call waits."""
        if turn.answer is None:
            _wait_for_versions(Path(os.environ[VARIABLE]))
        return super().step(turn)


def _wait_for_versions(home: Path) -> None:
    with (home / "held").open("a") as lock:  # the system releases the lock when this process is killed
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        before = _trained(home)
        while _trained(home) < before + VERSIONS:
            time.sleep(LOOK_S)


def _trained(home: Path) -> int:
    path = home / "history.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0
