"""What the log of control says about cuts, and what of a live trajectory is sent ahead at one. Pure.

A request stands until a record behind it says how things go on: a newer version, the same version again (the learner
was started again and knows of no request), or a release.
"""

from palimpsest.common.messages import Control, CutReleased, CutRequested, SegmentFlushed, VersionPublished
from palimpsest.common.versions import Version
from palimpsest.services.rollout.trajectory_builder import InFlightTrajectory, TrajectoryBuilder

NOTHING = Version(-1)
"""Held while any version may be sampled with."""


class CutState:
    """The last request, and whether it still stands. Records are to be heard in the order of the log.

    >>> cuts = Cuts()
    >>> cuts.observe(CutRequested("run", 1, Version(4), 5.0))
    >>> cuts.open.cut, cuts.held
    (1, 4)
    >>> cuts.observe(VersionPublished("run", Version(5), "digest", 0.0))
    >>> cuts.open, cuts.held
    (None, 4)
    >>> cuts.observe(CutRequested("run", 2, Version(5), 5.0))
    >>> cuts.held
    5
    >>> cuts.observe(CutReleased("run", 2))
    >>> cuts.open, cuts.held
    (None, 4)
    """

    def __init__(self) -> None:
        self.open: CutRequested | None = None
        """The request that stands; None: nothing is awaited."""
        self.held = NOTHING
        """No token is to be sampled with this version or an older one. When the cut is over, a newer version is there,
        or its own may be sampled with again; older ones are gone for good."""
        self._last = -1
        self._published: list[VersionPublished] = []

    def observe(self, message: Control) -> None:
        """Take in the next record."""
        match message:
            case CutRequested() if message.cut > self._last and message.version >= self._newest:
                # else it is a copy, which an outage may have put there, or of a learner that was replaced
                self._last, self.open, self.held = message.cut, message, message.version
            case CutReleased() if self.open is not None and message.cut == self.open.cut:
                self.release()
            case VersionPublished() if self._is_news(message):
                if message.version <= self.held:
                    self.release()
                self.open = None

    def release(self) -> None:
        """Await nothing more: the version of the cut that stands may be sampled with again."""
        if self.open is not None:
            self.held = Version(self.open.version - 1)
            self.open = None

    @property
    def _newest(self) -> Version:
        return self._published[0].version if self._published else NOTHING

    def _is_news(self, message: VersionPublished) -> bool:
        """Versions never go back: an older one's is a copy, the same one's news of a learner that was started again."""
        if message.version < self._newest or message in self._published:
            return False
        self._published = [message, *(self._published if message.version == self._newest else ())]
        return True


def flush(
    live: InFlightTrajectory, so_far: TrajectoryBuilder, *, request: CutRequested, worker: str
) -> SegmentFlushed | None:
    """The record of a live trajectory for this cut. None: it has no token of the cut's version but what was sent ahead.

    so_far: its tokens, those of the message under way included.
    """
    new = (segment for segment in so_far.segments if segment.stop > live.flushed)
    if all(segment.version != request.version for segment in new):
        return None
    return SegmentFlushed(
        run=request.run,
        trajectory=live.trajectory,
        group=live.group.group,
        attempt=live.attempt,
        worker=worker,
        cut=request.cut,
        tokens=so_far.pack(),
        segments=so_far.segments,
        temperature=live.group.sampling.temperature,
    )
