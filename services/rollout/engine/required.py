"""What a worker cannot go on without: when its engine refuses that, the process ends with a sentence and code 7."""

from collections.abc import Iterator
from contextlib import contextmanager

from palimpsest.common.user_error import ExitCode, UserError
from palimpsest.services.rollout.engine import crash_report
from palimpsest.services.rollout.engine.port import EngineFailed


@contextmanager
def required(what: str) -> Iterator[None]:
    """Raises UserError (ExitCode.ENGINE) in place of an EngineFailed from inside. `what`: the step, for the person.

    Another request would not help, and the engine's state is unknown: a new process starts with a new engine. Nothing
    is dropped or committed by it (docs/decisions/0013).
    """
    try:
        yield
    except EngineFailed as error:
        raise UserError(crash_report.step_refusal_text(what, str(error)), ExitCode.ENGINE) from None
