"""Errors for the user. The text says what is wrong, where, and what to do; the exit code classifies the error."""

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of the programs. docs/operations.md describes them."""

    DONE = 0
    CRASHED = 1
    """A bug or an external fault, with a traceback."""
    CONFIGURATION = 2
    """A key, value, folder or model of the configuration cannot be used."""
    UNAVAILABLE = 3
    """A resource is missing or in use: a port, disk space, another service."""
    DAMAGED = 4
    """Stored data contradicts its digest, or belongs to another run."""
    CANARY = 5
    """The engine does not compute what the learner published."""
    REPLACED = 6
    """Another process took over: a learner the run, or a worker the name."""
    STOPPED = 7
    """Clean stop that a person requested over REST. An orchestrator must not start the run again."""
    ENGINE = 8
    """The inference engine died, or refused a request of its worker. No data is lost; the process may be restarted."""
    INTERRUPTED = 130
    """Clean stop after Ctrl-C or SIGTERM."""


class UserError(Exception):
    """Ends the program with this error text and exit code, without a traceback."""

    def __init__(self, message: str, code: ExitCode = ExitCode.CONFIGURATION) -> None:
        super().__init__(message)
        self.code = code
