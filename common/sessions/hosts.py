"""The port to one session's environment, with two adapters: in this process, and in a child (child_host.py)."""

from typing import Protocol

from palimpsest.common.environments.port import (
    Environment,
    EnvironmentFailed,
    Opening,
    Outcome,
    Score,
    Turn,
)
from palimpsest.common.sessions.output_validation import check_opening, check_outcome, check_score


class AtCapacity(Exception):
    """The maximum number of concurrent sessions is reached."""


class EnvironmentHost(Protocol):
    """Runs an environment: the same calls with checked results, and a `close` that always succeeds.

    A call that may not return has a deadline, after which it raises EnvironmentFailed.
    """

    async def reset(self, seed: int) -> tuple[Opening, str]:
        """Begin the task. Return the opening and the hash of the state. Raises EnvironmentFailed."""

    async def step(self, turn: Turn) -> Outcome:
        """Process one message of the model. Raises EnvironmentFailed."""

    async def finalize(self) -> Score:
        """Score the current state. Raises EnvironmentFailed."""

    def close(self) -> None:
        """Release all resources, even during a call. Idempotent."""


class InProcess:
    """Runs the environment in this process: for the built-in ones, which are pure, fast and trusted."""

    def __init__(self, environment: Environment) -> None:
        self._environment = environment

    async def reset(self, seed: int) -> tuple[Opening, str]:
        """See EnvironmentHost."""
        try:
            opening, state_hash = self._environment.reset(seed), self._environment.state_hash()
        except Exception as error:
            raise as_environment_failure(error) from error
        return check_opening(opening), state_hash

    async def step(self, turn: Turn) -> Outcome:
        """See EnvironmentHost."""
        try:
            outcome = self._environment.step(turn)
        except Exception as error:
            raise as_environment_failure(error) from error
        return check_outcome(outcome)

    async def finalize(self) -> Score:
        """See EnvironmentHost."""
        try:
            score = self._environment.finalize()
        except Exception as error:
            raise as_environment_failure(error) from error
        return check_score(score)

    def close(self) -> None:
        """See EnvironmentHost."""


def as_environment_failure(error: BaseException) -> EnvironmentFailed:
    """Return the failure of an environment that raised."""
    return EnvironmentFailed("environment_raised", f"{type(error).__name__}: {error}"[:2000])
