"""What a worker cannot go on without: when its engine refuses that, the process ends with a sentence and code 7."""

from collections.abc import Iterator
from contextlib import contextmanager

from common.refusal import ExitCode, Refusal
from services.rollout import engine_death
from services.rollout.engine import EngineFailed


@contextmanager
def needed(what: str) -> Iterator[None]:
    """Raises Refusal (ExitCode.ENGINE) in place of an EngineFailed from inside. `what`: the step, for the person.

    Another request would not help, and the engine's state is unknown: a new process starts with a new engine. Nothing
    is dropped or committed by it (docs/decisions/0013).
    """
    try:
        yield
    except EngineFailed as error:
        raise Refusal(engine_death.refused_step(what, str(error)), ExitCode.ENGINE) from None
