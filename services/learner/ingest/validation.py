"""Checks of a record before the learner uses it. Pure."""

import math

from palimpsest.common.arrays import unpack_int32
from palimpsest.common.branches import MARK, sequences
from palimpsest.common.messages import SegmentFlushed, TrajectoryDropped, TrajectoryFinished
from palimpsest.common.rejected_record import RejectCause
from palimpsest.common.routes import RouteShape, check_routes
from palimpsest.common.trajectory import MalformedTrajectory, check, check_tokens
from palimpsest.common.versions import Version

MOST_TOKENS = 1 << 24
"""Maximum tokens of a trajectory. A longer one is rejected."""


def validate(
    message: TrajectoryFinished | TrajectoryDropped | SegmentFlushed,
    newest: Version,
    *,
    vocabulary: int,
    routes: RouteShape | None = None,
) -> None:
    """Raise MalformedTrajectory unless the message can be used.

    newest: no token can be of a later version. vocabulary: number of token ids of the model. routes: of the experts
    that the record must carry, None: none.
    """
    match message:
        case TrajectoryFinished():
            check_finished(message, newest, vocabulary=vocabulary)
            if routes is not None:
                for sequence in sequences(message):
                    check_routes(sequence.segments, routes)
        case SegmentFlushed():
            check_sampled(message, newest, vocabulary=vocabulary)
            if routes is not None:
                check_routes(message.segments, routes)


def check_sampled(message: TrajectoryFinished | SegmentFlushed, newest: Version, *, vocabulary: int) -> None:
    """Raise MalformedTrajectory unless everything that scoring relies on holds."""
    if len(message.tokens) % 4 or not 0 < len(message.tokens) <= 4 * MOST_TOKENS:
        raise MalformedTrajectory(
            RejectCause.LENGTH_MISMATCH,
            f"{len(message.tokens)} bytes are not an array of 1 to {MOST_TOKENS} 4-byte tokens",
        )
    tokens = unpack_int32(message.tokens)
    check_tokens(tokens, vocabulary)
    check(message.segments, len(tokens))
    for segment in message.segments:
        if segment.version > newest:
            raise MalformedTrajectory(
                RejectCause.UNKNOWN_VERSION,
                f"a segment is of version {segment.version}, but the newest published version is {newest}",
            )
        if segment.start == 0:
            raise MalformedTrajectory(
                RejectCause.LENGTH_MISMATCH, "the first token is marked as sampled, but it has no prefix"
            )
    if not math.isfinite(message.temperature):
        raise MalformedTrajectory(RejectCause.NOT_FINITE, f"temperature is {message.temperature}; it must be finite")
    if message.temperature <= 0:
        raise MalformedTrajectory(RejectCause.OUT_OF_RANGE, f"temperature is {message.temperature}; it must be above 0")


def check_finished(message: TrajectoryFinished, newest: Version, *, vocabulary: int) -> None:
    """Raise MalformedTrajectory unless everything that training relies on holds."""
    if MARK in message.trajectory or any(branch.number < 1 for branch in message.branches):
        raise MalformedTrajectory(RejectCause.OUT_OF_RANGE, "the branches of a trajectory are numbered from 1")
    if len({branch.number for branch in message.branches}) < len(message.branches):
        raise MalformedTrajectory(RejectCause.OUT_OF_RANGE, "two branches of a trajectory have one number")
    for sequence in sequences(message):
        check_sampled(sequence, newest, vocabulary=vocabulary)
    if not math.isfinite(message.reward):
        raise MalformedTrajectory(RejectCause.NOT_FINITE, f"reward is {message.reward}; it must be finite")
    if not 0 <= message.reward <= 1:
        raise MalformedTrajectory(RejectCause.OUT_OF_RANGE, f"reward is {message.reward}; it must be in [0, 1]")
