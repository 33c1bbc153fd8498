"""The state of cuts according to the topic `control`, and the flush record of a trajectory. Pure.

A request is open until a later record ends it: a newer version, the same version again (a restarted learner, which has
no record of the request), or a release.
"""

from palimpsest.common.messages import Control, CutReleased, CutRequested, SegmentFlushed, VersionPublished
from palimpsest.common.versions import Version
from palimpsest.services.rollout.trajectory_builder import InFlightTrajectory, TrajectoryBuilder

NOTHING = Version(-1)
"""Value of `held` if every version may be sampled."""


class CutState:
    """The last request, and whether it is open. Records must be observed in the order of the log.

    >>> cuts = CutState()
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
        """The open request, or None."""
        self.held = NOTHING
        """No token may be sampled with this version or an older one. When a cut ends, either a newer version exists, or
        the cut's version may be sampled again; older versions stay held."""
        self._last = -1
        self._published: list[VersionPublished] = []

    def observe(self, message: Control) -> None:
        """Update the state with the next record."""
        match message:
            case CutRequested() if message.cut > self._last and message.version >= self._newest:
                # Any other request is a duplicate that an outage caused, or comes from a replaced learner.
                self._last, self.open, self.held = message.cut, message, message.version
            case CutReleased() if self.open is not None and message.cut == self.open.cut:
                self.release()
            case VersionPublished() if self._is_news(message):
                if message.version <= self.held:
                    self.release()
                self.open = None

    def release(self) -> None:
        """Close the open request: the version of its cut may be sampled again."""
        if self.open is not None:
            self.held = Version(self.open.version - 1)
            self.open = None

    @property
    def _newest(self) -> Version:
        return self._published[0].version if self._published else NOTHING

    def _is_news(self, message: VersionPublished) -> bool:
        """Whether the record is new. An older version is a duplicate; the same version means a restarted learner."""
        if message.version < self._newest or message in self._published:
            return False
        self._published = [message, *(self._published if message.version == self._newest else ())]
        return True


def flush(
    live: InFlightTrajectory, so_far: TrajectoryBuilder, *, request: CutRequested, worker: str
) -> SegmentFlushed | None:
    """Return the flush record of a trajectory for this cut, or None if it has no unflushed token of the cut's version.

    so_far: the trajectory including the message in flight.
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
