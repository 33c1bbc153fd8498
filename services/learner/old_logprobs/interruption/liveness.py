"""Which workers are alive, judged by their records. Pure.

A worker publishes a heartbeat every few seconds, also while it is paused. It counts as dead once nothing was read from
it for ALIVE_S, until something is read again. A worker without a version has sampled nothing, so that no cut waits for
it.
"""

from palimpsest.common.messages import FromWorker, WorkerAlive

ALIVE_S = 10.0
"""A worker counts as alive for this long after its last record."""


class WorkerLiveness:
    """Times are of any one clock, in seconds.

    >>> liveness = WorkerLiveness()
    >>> a = WorkerAlive("run", "a", version=3, live=8, sampled_tokens=90, seconds=9.0, idle_s=0.0)
    >>> b = WorkerAlive("run", "b", version=-1, live=0, sampled_tokens=0, seconds=0.0, idle_s=0.0)
    >>> liveness.record_heartbeat(a, now=50.0)
    >>> liveness.record_heartbeat(b, now=50.0)
    >>> sorted(liveness.alive(now=59.9)), sorted(liveness.alive(now=60.1))
    (['a'], [])
    """

    def __init__(self) -> None:
        self._last: dict[str, float] = {}

    def record_heartbeat(self, message: FromWorker, *, now: float) -> None:
        """A record of this worker was read, of any kind. The time of reading counts: the log does not tell its age."""
        if isinstance(message, WorkerAlive) and message.version < 0:
            self._last.pop(message.worker, None)
        else:
            self._last[message.worker] = now

    def discount_outage(self, lost_s: float, *, now: float) -> None:
        """For `lost_s` until now no worker could be heard: that time does not count as silence."""
        self._last = {worker: min(now, at + lost_s) for worker, at in self._last.items()}

    def alive(self, *, now: float) -> frozenset[str]:
        """The workers of which a record was read within ALIVE_S."""
        self._last = {worker: at for worker, at in self._last.items() if now - at <= ALIVE_S}
        return frozenset(self._last)
