"""The records of cuts and of old log-probs: how the interruption and the replica are told of on the log.

They are part of common/messages.py, which says what a record is, and are imported from there.
"""

from msgspec import Struct

from palimpsest.common.trajectory import Segment
from palimpsest.common.versions import Version


class SegmentFlushed(Struct, frozen=True, forbid_unknown_fields=True, tag="segment_flushed/1"):
    """A live trajectory at a cut, so that its tokens are scored before the weights change. Topic `trajectories`, key =
    group. Its end follows later, whole: this record changes nothing in the ledger."""

    run: str
    trajectory: str
    group: str
    attempt: int
    worker: str
    cut: int
    """The cut it was flushed for."""
    tokens: bytes
    """int32: everything up to the cut, the prefix that the tokens are scored behind."""
    segments: tuple[Segment, ...]
    """All so far; those of the cut's version are to be scored."""
    temperature: float


class CutRequested(Struct, frozen=True, forbid_unknown_fields=True, tag="cut_requested/1"):
    """Stop sampling with this version and flush what it sampled: its weights are about to change. Topic `control`."""

    run: str
    cut: int
    """Counts up over the whole run, restarts included."""
    version: Version
    deadline_s: float
    """From the request on; a worker that has not answered by then is left out."""


class CutReleased(Struct, frozen=True, forbid_unknown_fields=True, tag="cut_released/1"):
    """Sample on, with the weights you have: no version comes of this cut. Topic `control`."""

    run: str
    cut: int


class CutReached(Struct, frozen=True, forbid_unknown_fields=True, tag="cut_reached/1"):
    """A worker stands still, and everything it sampled so far is on the log. Topic `workers`, key = worker."""

    run: str
    worker: str
    cut: int
    version: int
    """On its engine; when it is not the cut's, there is nothing of the cut's version to flush. -1 before the first."""
    positions: dict[int, int]
    """Topic `trajectories`: partition -> offset after its last record there."""
    flushed: int
    """Live trajectories flushed for this cut."""
    pause_s: float
    """From the request's arrival until the engine stood still."""


class OldLogprobsRequested(Struct, frozen=True, forbid_unknown_fields=True, tag="old_logprobs_requested/1"):
    """Scores are awaited in vain: whichever replica reads this scores them. Topic `old_logprobs`, key = trajectory."""

    run: str
    trajectory: str
    tokens: bytes
    """int32"""
    segments: tuple[Segment, ...]
    """Those to be scored."""
    temperature: float


class OldLogprobsComputed(Struct, frozen=True, forbid_unknown_fields=True, tag="old_logprobs_computed/1"):
    """Old log-probs of one segment. Topic `old_logprobs`, key = trajectory. Said twice, it means the same."""

    run: str
    trajectory: str
    by: str
    """`learner`, or the replica's name."""
    version: Version
    digest: str
    """Of the version's weights."""
    start: int
    stop: int
    prefix: str
    """blake3 of the int32 bytes of tokens [0, stop): a trajectory sampled twice has other tokens under the same id."""
    values: bytes
    """float32, one for each token [start, stop), nats: log pi_version of the sampled token."""
