"""Where one session's environment runs. Two adapters: in this process, and in a child (processes/world.py)."""

from typing import Protocol

from palimpsest.services.env_gateway.environments.port import (
    Environment,
    EnvironmentFailed,
    Opening,
    Outcome,
    Score,
    Turn,
)
from palimpsest.services.env_gateway.output_validation import check_opening, check_outcome, check_score


class AtCapacity(Exception):
    """As many sessions of this kind run as may run at once."""


class EnvironmentHost(Protocol):
    """An environment at a distance: the same calls, checked results, and an end that always succeeds.

    A call that cannot be relied on to come back has a deadline, and raises EnvironmentFailed when that has passed.
    """

    async def reset(self, seed: int) -> tuple[Opening, str]:
        """Begin; gives the opening and the hash of the state it leaves. Raises EnvironmentFailed."""

    async def step(self, turn: Turn) -> Outcome:
        """Take one message. Raises EnvironmentFailed."""

    async def finalize(self) -> Score:
        """Score what there is. Raises EnvironmentFailed."""

    def close(self) -> None:
        """Give back what it holds, even in the middle of a call. Safe to call twice."""


class InProcess:
    """The environment is an object here: for the built-in ones, which are pure, quick and trusted."""

    def __init__(self, environment: Environment) -> None:
        self._environment = environment

    async def reset(self, seed: int) -> tuple[Opening, str]:
        """See World."""
        try:
            opening, state_hash = self._environment.reset(seed), self._environment.state_hash()
        except Exception as error:
            raise as_environment_failure(error) from error
        return check_opening(opening), state_hash

    async def step(self, turn: Turn) -> Outcome:
        """See World."""
        try:
            outcome = self._environment.step(turn)
        except Exception as error:
            raise as_environment_failure(error) from error
        return check_outcome(outcome)

    async def finalize(self) -> Score:
        """See World."""
        try:
            score = self._environment.finalize()
        except Exception as error:
            raise as_environment_failure(error) from error
        return check_score(score)

    def close(self) -> None:
        """See World."""


def as_environment_failure(error: BaseException) -> EnvironmentFailed:
    """The failure of an environment that raised."""
    return EnvironmentFailed("environment_raised", f"{type(error).__name__}: {error}"[:2000])
