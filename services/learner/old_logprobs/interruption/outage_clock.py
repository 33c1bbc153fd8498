"""Notices outages: times in which the learner could hear no worker. Pure.

A worker that says nothing is dead or too slow. If the log does not answer, or the learner does not read, the silence
says nothing about the workers, and they must not lose time for it.
"""

OUTAGE_S = 5.0
"""Between two reads, a longer gap is an outage."""
MOST_LOST_S = 900.0
"""A cut waits no longer for workers once outages have cost it this much: a log that fails again and again must not hold
the learner forever."""


class OutageClock:
    """Measures the gaps between reads. Times are of any one clock, in seconds.

    >>> outages = OutageClock()
    >>> outages.read(now=100.0), outages.read(now=103.0), outages.read(now=163.0)
    (0.0, 0.0, 60.0)
    """

    def __init__(self) -> None:
        self._last: float | None = None
        self._lost_s = 0.0

    def read(self, *, now: float) -> float:
        """The workers were heard, as far as there was anything to hear; seconds of the outage before that, or 0."""
        gap_s = 0.0 if self._last is None else now - self._last
        self._last = now
        return gap_s if gap_s >= OUTAGE_S else 0.0

    def begin_cut(self) -> None:
        """Count the outages of a new cut."""
        self._lost_s = 0.0

    def extends_cut(self, lost_s: float) -> bool:
        """Whether the workers get their whole time for the cut again after an outage of `lost_s`."""
        extends = lost_s > 0 and self._lost_s < MOST_LOST_S
        self._lost_s += lost_s
        return extends
