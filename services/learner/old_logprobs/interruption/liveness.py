"""Tracks which workers are alive, by the times of their records. Pure.

A worker publishes a heartbeat every few seconds, also while it is paused. It counts as dead if no record of it was read
for ALIVE_S seconds, until another record is read. A worker without a version has sampled nothing, so no cut waits for
it, unless engines sleep: it may be starting an engine, which takes memory.
"""

from palimpsest.common.messages import FromWorker, WorkerAlive

ALIVE_S = 10.0
"""Seconds after its last record for which a worker counts as alive."""


class WorkerLiveness:
    """Keeps the time of each worker's last record. Times are seconds of any one clock.

    >>> liveness = WorkerLiveness()
    >>> a = WorkerAlive("run", "a", version=3, live=8, sampled_tokens=90, seconds=9.0, idle_s=0.0)
    >>> b = WorkerAlive("run", "b", version=-1, live=0, sampled_tokens=0, seconds=0.0, idle_s=0.0)
    >>> liveness.record_heartbeat(a, now=50.0)
    >>> liveness.record_heartbeat(b, now=50.0)
    >>> sorted(liveness.alive(now=59.9)), sorted(liveness.alive(now=60.1))
    (['a'], [])
    """

    def __init__(self, *, sleeping: bool = False) -> None:
        """sleeping: whether engines sleep at a cut."""
        self._counts_all = sleeping
        self._last: dict[str, float] = {}

    def record_heartbeat(self, message: FromWorker, *, now: float) -> None:
        """Note that a record of this worker, of any kind, was read at `now`. Its age on the log is not known."""
        if isinstance(message, WorkerAlive) and message.version < 0 and not self._counts_all:
            self._last.pop(message.worker, None)
        else:
            self._last[message.worker] = now

    def discount_outage(self, lost_s: float, *, now: float) -> None:
        """Do not count the last `lost_s` seconds as silence: no record could be read in that time."""
        self._last = {worker: min(now, at + lost_s) for worker, at in self._last.items()}

    def alive(self, *, now: float) -> frozenset[str]:
        """Names of the workers with a record read within the last ALIVE_S seconds."""
        self._last = {worker: at for worker, at in self._last.items() if now - at <= ALIVE_S}
        return frozenset(self._last)
