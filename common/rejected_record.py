"""Rejection of a record on the log: a cause for programs and an error text for people."""

from enum import StrEnum


class RejectCause(StrEnum):
    """Cause of the rejection of a record."""

    UNDECODABLE = "undecodable"
    """The bytes are no message: garbage, truncated, or a field is missing, unknown or of another type."""
    UNKNOWN_SCHEMA = "unknown_schema"
    """The readers of the topic do not have this message type or schema number; another release wrote it."""
    NOT_FINITE = "not_finite"
    """A log-prob, reward or temperature is NaN or infinite."""
    OUT_OF_RANGE = "out_of_range"
    """A log-prob above 0, a token id outside the model's vocabulary, a reward outside [0, 1], a temperature or an
    offer's limit not above 0."""
    LENGTH_MISMATCH = "length_mismatch"
    """Tokens, segments and log-probs contradict each other: a segment has the wrong number of bytes, overlaps another
    one or exceeds the tokens."""
    NEGATIVE_VERSION = "negative_version"
    """A version is negative; versions start at 0."""
    UNKNOWN_VERSION = "unknown_version"
    """The run never published this version."""
    WRONG_RUN = "wrong_run"
    """Valid, but of another run."""
    NEVER_OFFERED = "never_offered"
    """Valid, but of a trajectory that this run never offered."""
    CONTRADICTS_OFFER = "contradicts_offer"
    """Valid, but sampled otherwise than its group was offered: another environment or temperature, or above a limit."""
    FORWARD_FAILED = "forward_failed"
    """Valid, but a pass over this trajectory alone, forward or backward, fails or gives a gradient that is not finite,
    and passes over others do not."""
    UNKNOWN_WRITER = "unknown_writer"
    """A record of `control`, or an offer, that names no learner of this run, or none: another program wrote it."""
    MISSING_CLAIM = "missing_claim"
    """The object store does not hold the body of this long record."""


FOREIGN = frozenset({RejectCause.WRONG_RUN, RejectCause.NEVER_OFFERED})
"""Causes of valid records that do not belong to this run. Their rejection loses no data of the run."""


MOST_REASON_CHARS = 1000
"""Longest error text. It goes to logs and dead letters, and may quote what another program wrote."""


class RejectedRecord(ValueError):
    """Raised for a record that cannot be used, with its cause and an error text."""

    def __init__(self, cause: RejectCause, reason: str) -> None:
        super().__init__(reason if len(reason) <= MOST_REASON_CHARS else f"{reason[:MOST_REASON_CHARS]} [...]")
        self.cause = cause
