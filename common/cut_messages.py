"""Messages of cuts and of old log-probs, which the interruption and replica routes exchange.

common/messages.py describes the message format and re-exports these messages. Import them from there.
"""

from typing import Annotated

from msgspec import Meta, Struct

from palimpsest.common.trajectory import Segment
from palimpsest.common.versions import Version

CutNumber = Annotated[int, Meta(le=1 << 53)]
"""Number of a cut. The limit leaves room for the numbers that follow one that another program wrote."""


class SegmentFlushed(Struct, frozen=True, forbid_unknown_fields=True, tag="segment_flushed/1"):
    """A live trajectory at a cut, flushed so that its tokens are scored before the weights change.

    Topic `trajectories`, key = group. The complete trajectory follows later as another message; this one does not
    change the ledger.
    """

    run: str
    trajectory: str
    group: str
    attempt: int
    worker: str
    cut: CutNumber
    """Number of the cut."""
    tokens: bytes
    """int32: all tokens up to the cut, prompt included."""
    segments: tuple[Segment, ...]
    """All segments up to the cut. The learner scores those of the version of the cut."""
    temperature: float


class CutRequested(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, tag="cut_requested/1"):
    """Request to stop sampling with this version and to flush its tokens, because the weights are about to change.

    Topic `control`.
    """

    run: str
    cut: CutNumber
    """Number of the cut. It increases over the run, restarts included."""
    version: Version
    deadline_s: float
    """Seconds after the request. The cut excludes workers that answer later."""
    writer: int = 0
    """Epoch of the learner that wrote the record. Records of earlier releases name none: 0."""


class CutReleased(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, tag="cut_released/1"):
    """Request to resume sampling with the same weights: this cut publishes no version. Topic `control`."""

    run: str
    cut: CutNumber
    writer: int = 0
    """See CutRequested."""


class CutReached(Struct, frozen=True, forbid_unknown_fields=True, tag="cut_reached/1"):
    """A worker stopped sampling, and all tokens that it sampled are on the log. Topic `workers`, key = worker."""

    run: str
    worker: str
    cut: CutNumber
    version: int
    """Version on the engine of the worker, -1 before the first. If it is not the version of the cut, the worker has
    nothing to flush."""
    positions: dict[int, int]
    """Partition of topic `trajectories` -> offset after the last record of the worker."""
    flushed: int
    """Number of live trajectories flushed for this cut."""
    pause_s: float
    """Seconds from the arrival of the request until the engine stopped."""


class OldLogprobsRequested(Struct, frozen=True, forbid_unknown_fields=True, tag="old_logprobs_requested/1"):
    """Request to score segments whose scores did not arrive. The replica that reads it scores them.

    Topic `old_logprobs`, key = trajectory.
    """

    run: str
    trajectory: str
    tokens: bytes
    """int32: all tokens of the trajectory."""
    segments: tuple[Segment, ...]
    """Segments to score."""
    temperature: float


class OldLogprobsComputed(Struct, frozen=True, forbid_unknown_fields=True, tag="old_logprobs_computed/1"):
    """Old log-probs of one segment. Topic `old_logprobs`, key = trajectory. A duplicate has no effect."""

    run: str
    trajectory: str
    by: str
    """`learner`, or the name of the replica."""
    version: Version
    digest: str
    """Digest of the weights of the version."""
    start: int
    stop: int
    prefix: str
    """blake3 of the int32 bytes of tokens [0, stop). A second attempt at a trajectory has the same id and different
    tokens."""
    values: bytes
    """float32, one value per token of [start, stop), in nats: log pi_version of the sampled token."""
