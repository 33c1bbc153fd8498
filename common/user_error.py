"""Errors a person has to act on: one sentence that says what was wrong, where, and what to do; and an exit code."""

from enum import IntEnum


class ExitCode(IntEnum):
    """How a Palimpsest program ends. docs/operations.md lists them."""

    DONE = 0
    CRASHED = 1
    """A bug or a fault from outside; the traceback says which."""
    CONFIGURATION = 2
    """A key, a value, a folder or a model that the person named cannot be used."""
    UNAVAILABLE = 3
    """Something of the machine is missing or taken: a port, disk space, another service."""
    DAMAGED = 4
    """Stored data contradicts its digest or another run's."""
    CANARY = 5
    """The engine does not compute what the learner published."""
    REPLACED = 6
    """Another learner took this run over."""
    ENGINE = 7
    """The inference engine died, or refused what its worker needs. Nothing is lost, and the process may start again."""
    INTERRUPTED = 130
    """Ctrl-C or SIGTERM; stopped cleanly."""


class UserError(Exception):
    """Stops the program with this sentence and this exit code, without a traceback."""

    def __init__(self, message: str, code: ExitCode = ExitCode.CONFIGURATION) -> None:
        super().__init__(message)
        self.code = code
