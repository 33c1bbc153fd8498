"""Tokens of a trajectory, and the segments that say which version sampled them.

A trajectory has one token array and segments over it. A token is trainable if a segment covers it; there is no separate
mask that could disagree. Index t refers to token t: its version and its log-probs describe the prediction *of* token t
(docs/paper.md, "alignment").
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from msgspec import Struct

from palimpsest.common.arrays import Float32Array, Int32Array, unpack_float32
from palimpsest.common.rejected_record import RejectCause, RejectedRecord
from palimpsest.common.versions import UNTRAINABLE, Version

LOWEST_LOGPROB = -104.0
"""Log of the smallest float32, 2^-149, is -103.3 nats: an engine whose probabilities are float32 cannot sample a token
of a lower probability."""


class Segment(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Longest run of tokens in one turn that one version sampled: tokens [start, stop)."""

    start: int
    stop: int
    version: Version
    behavior_logprobs: bytes
    """float32, one value per token, in nats: log mu_version of the sampled token, measured by the engine."""
    routes: bytes = b""
    """With learner.routing_replay = "engine": the experts that the engine chose for the positions since the previous
    segment (common/routes.py); uint8, or uint16 above 256 experts, [positions, layers, experts of a token]. Releases
    without this field reject the record."""

    def __len__(self) -> int:
        return self.stop - self.start


class MalformedTrajectory(RejectedRecord):
    """Raised for a trajectory that contradicts itself. The error text names the segment."""


def check(segments: Sequence[Segment], tokens: int) -> None:
    """Raise MalformedTrajectory unless segments are ordered, disjoint, inside the tokens, with finite log-probs."""
    end = 0
    for i, segment in enumerate(segments):
        where = f"segment {i} [{segment.start}, {segment.stop}) of version {segment.version}"
        if segment.version < 0:
            raise MalformedTrajectory(RejectCause.NEGATIVE_VERSION, f"{where}: versions start at 0")
        if segment.start < end:
            raise MalformedTrajectory(
                RejectCause.LENGTH_MISMATCH, f"{where}: starts before token {end}, where the previous segment ends"
            )
        if segment.stop <= segment.start:
            raise MalformedTrajectory(RejectCause.LENGTH_MISMATCH, f"{where}: holds no token")
        if segment.stop > tokens:
            raise MalformedTrajectory(RejectCause.LENGTH_MISMATCH, f"{where}: ends after the last of {tokens} tokens")
        if len(segment.behavior_logprobs) != 4 * len(segment):
            raise MalformedTrajectory(
                RejectCause.LENGTH_MISMATCH,
                f"{where}: {len(segment)} tokens but {len(segment.behavior_logprobs)} bytes of log-probs, expected "
                f"{4 * len(segment)}",
            )
        logprobs = unpack_float32(segment.behavior_logprobs)
        if not np.isfinite(logprobs).all():
            raise MalformedTrajectory(RejectCause.NOT_FINITE, f"{where}: a behavior log-prob is not finite")
        if (logprobs > 1e-3).any():  # values slightly above 0 are rounding errors of the engine's log-softmax
            raise MalformedTrajectory(RejectCause.OUT_OF_RANGE, f"{where}: a behavior log-prob is above 0")
        if (logprobs < LOWEST_LOGPROB).any():
            raise MalformedTrajectory(
                RejectCause.OUT_OF_RANGE,
                f"{where}: a behavior log-prob is {logprobs.min():.4g}; no engine samples a token below "
                f"{LOWEST_LOGPROB}",
            )
        end = segment.stop


def check_tokens(tokens: Int32Array, vocabulary: int) -> None:
    """Raise MalformedTrajectory unless all token ids are in [0, vocabulary): the model has no embedding for others.

    >>> check_tokens(np.array([5, 300, -2], dtype=np.int32), 300)
    Traceback (most recent call last):
    palimpsest.common.trajectory.MalformedTrajectory: token 1 has id 300; the model's vocabulary is 0 to 299
    """
    outside = np.flatnonzero((tokens < 0) | (tokens >= vocabulary))
    if len(outside):
        raise MalformedTrajectory(
            RejectCause.OUT_OF_RANGE,
            f"token {outside[0]} has id {tokens[outside[0]]}; the model's vocabulary is 0 to {vocabulary - 1}",
        )


def token_versions(segments: Sequence[Segment], tokens: int) -> Int32Array:
    """Return the version that sampled each token, UNTRAINABLE for tokens outside of segments. [tokens] int32

    >>> token_versions([Segment(1, 3, Version(4), bytes(8))], 4).tolist()
    [-1, 4, 4, -1]
    """
    versions = np.full(tokens, UNTRAINABLE, dtype=np.int32)
    for segment in segments:
        versions[segment.start : segment.stop] = segment.version
    return versions


def behavior_logprobs(segments: Sequence[Segment], tokens: int) -> Float32Array:
    """Return the behavior log-prob of each token, 0 for tokens outside of segments. [tokens] float32, nats"""
    logprobs = np.zeros(tokens, dtype=np.float32)
    for segment in segments:
        logprobs[segment.start : segment.stop] = unpack_float32(segment.behavior_logprobs)
    return logprobs


def cuts(segments: Sequence[Segment]) -> list[int]:
    """Return the token indexes at which the version changes inside a turn (adjacent segments).

    >>> cuts([Segment(1, 3, Version(4), b""), Segment(3, 5, Version(5), b""), Segment(9, 10, Version(6), b"")])
    [3]
    """
    return [
        after.start
        for before, after in pairwise(segments)
        if before.stop == after.start and before.version != after.version
    ]


def trainable(segments: Sequence[Segment]) -> int:
    """Return the number of trainable tokens."""
    return sum(map(len, segments))
