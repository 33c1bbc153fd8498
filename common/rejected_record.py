"""Why a record on the log cannot be used: a cause for machines beside the sentence for people."""

from enum import StrEnum


class RejectCause(StrEnum):
    """Why a record could not be used."""

    UNDECODABLE = "undecodable"
    """No record at all: garbage, cut short, a field missing, unknown or of another type."""
    UNKNOWN_SCHEMA = "unknown_schema"
    """A kind or schema number that the topic's readers do not know: a writer of another release."""
    NOT_FINITE = "not_finite"
    """A log-prob, reward or temperature is NaN or infinite."""
    OUT_OF_RANGE = "out_of_range"
    """A log-prob above 0, a negative token, a reward outside [0, 1], a temperature or an offer's limit not above 0."""
    LENGTH_MISMATCH = "length_mismatch"
    """Tokens, segments and log-probs contradict each other: bytes against a span, spans that overlap or leave the
    tokens."""
    NEGATIVE_VERSION = "negative_version"
    """Versions start at 0."""
    UNKNOWN_VERSION = "unknown_version"
    """A version that was never published."""
    WRONG_RUN = "wrong_run"
    """Sound, but of another run."""
    NEVER_OFFERED = "never_offered"
    """Sound, but of a trajectory that this run never offered."""
    MISSING_CLAIM = "missing_claim"
    """The body of a long record is gone from the object store."""


FOREIGN = frozenset({RejectCause.WRONG_RUN, RejectCause.NEVER_OFFERED})
"""Causes of sound records that have no place in this run: they take nothing from it."""


class RejectedRecord(ValueError):
    """A record that cannot be used: its cause, and the sentence."""

    def __init__(self, cause: RejectCause, reason: str) -> None:
        super().__init__(reason)
        self.cause = cause
