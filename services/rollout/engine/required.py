"""Steps that a worker needs: if its engine refuses one, the process ends with a message and exit code 8."""

from collections.abc import Iterator
from contextlib import contextmanager

from palimpsest.common.user_error import ExitCode, UserError
from palimpsest.services.rollout.engine import crash_report
from palimpsest.services.rollout.engine.port import EngineFailed


@contextmanager
def required(what: str) -> Iterator[None]:
    """Raise UserError (ExitCode.ENGINE) in place of an EngineFailed from the block. `what`: the step, for the message.

    Another request would not help, because the engine's state is unknown: a new process starts with a new engine. The
    failure drops and commits no trajectory (docs/decisions/0013).
    """
    try:
        yield
    except EngineFailed as error:
        raise UserError(crash_report.step_refusal_text(what, str(error)), ExitCode.ENGINE) from None
