"""Detects outages: times in which the learner read no records of workers. Pure.

A worker without new records is dead or too slow, unless the log does not answer or the learner does not read. Such an
outage must not count against the workers' deadline.
"""

OUTAGE_S = 5.0
"""A gap of at least this many seconds between two reads is an outage."""
MOST_LOST_S = 900.0
"""Total outage of a cut, in seconds, after which outages do not extend its deadline: a log that fails repeatedly must
not block the learner forever."""


class OutageClock:
    """Measures the gaps between reads. Times are seconds of any one clock.

    >>> outages = OutageClock()
    >>> outages.read(now=100.0), outages.read(now=103.0), outages.read(now=163.0)
    (0.0, 0.0, 60.0)
    """

    def __init__(self) -> None:
        self._last: float | None = None
        self._lost_s = 0.0

    def read(self, *, now: float) -> float:
        """Note a read up to the end of the topic. Return the seconds of the outage before it, or 0."""
        gap_s = 0.0 if self._last is None else now - self._last
        self._last = now
        return gap_s if gap_s >= OUTAGE_S else 0.0

    def begin_cut(self) -> None:
        """Start counting outages for a new cut."""
        self._lost_s = 0.0

    def extends_cut(self, lost_s: float) -> bool:
        """Count an outage of `lost_s` seconds. Return whether it restarts the deadline of the cut."""
        extends = lost_s > 0 and self._lost_s < MOST_LOST_S
        self._lost_s += lost_s
        return extends
