"""Converts records on the log to rows that can be scored. Pure."""

import math
from collections.abc import Mapping
from typing import Any

from palimpsest.common.arrays import unpack_int32
from palimpsest.common.branches import sequences
from palimpsest.common.messages import OldLogprobsRequested, SegmentFlushed, TrajectoryFinished
from palimpsest.common.rejected_record import RejectCause, RejectedRecord
from palimpsest.common.trajectory import MalformedTrajectory, check, check_tokens
from palimpsest.common.versions import Version
from palimpsest.services.learner.batch.batching import Row
from palimpsest.services.learner.old_logprobs.scoring import rows_by_version

LAST_VERSION = 2**31 - 1
"""Largest version of a token: versions are int32."""


def rows_of(message: Any, *, run: str, vocabulary: int) -> list[Mapping[Version, Row]]:
    """Return the rows to score of each token sequence of a message, by version; empty if it has none.

    Raises RejectedRecord if it is of another run, or if no model can score it.
    """
    if message.run != run:
        raise RejectedRecord(RejectCause.WRONG_RUN, f"the record is of run {message.run}, not of {run}")
    if not isinstance(message, TrajectoryFinished | SegmentFlushed | OldLogprobsRequested):
        return []
    parts = sequences(message) if isinstance(message, TrajectoryFinished) else (message,)
    return [rows for part in parts if (rows := to_rows(part, vocabulary=vocabulary))]


def to_rows(
    message: TrajectoryFinished | SegmentFlushed | OldLogprobsRequested, *, vocabulary: int
) -> Mapping[Version, Row]:
    """Return the rows to score, by version; empty if no token was sampled. vocabulary: number of token ids.

    Raises MalformedTrajectory if no model can score the record: a bad record must not end every replica that reads it.
    """
    if len(message.tokens) % 4 or not message.tokens:
        raise MalformedTrajectory(
            RejectCause.LENGTH_MISMATCH, f"{len(message.tokens)} bytes are not an array of 4-byte tokens"
        )
    tokens = unpack_int32(message.tokens)
    check_tokens(tokens, vocabulary)
    check(message.segments, len(tokens))
    if any(segment.version > LAST_VERSION for segment in message.segments):
        raise MalformedTrajectory(RejectCause.UNKNOWN_VERSION, f"a segment is of a version above {LAST_VERSION}")
    if message.segments and message.segments[0].start == 0:
        raise MalformedTrajectory(
            RejectCause.LENGTH_MISMATCH, "the first token is marked as sampled, but it has no prefix"
        )
    if not math.isfinite(message.temperature) or message.temperature <= 0:
        raise MalformedTrajectory(
            RejectCause.OUT_OF_RANGE, f"temperature is {message.temperature}; it must be finite and above 0"
        )
    return rows_by_version(message.trajectory, tokens, message.segments, message.temperature)
