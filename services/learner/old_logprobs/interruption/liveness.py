"""Which workers are alive, by what is heard of them. Pure: the caller has the clock.

A worker says how it fares every few seconds, also while it stands still. One that is not heard of for ROSTER_S is gone
until it is heard of again. One that says it has no version yet has sampled nothing: nobody need wait for it. When none
at all is heard of, the log does not answer, or nobody listens: that is not the workers' silence, and does not count.
"""

from palimpsest.common.messages import FromWorker, WorkerAlive

ROSTER_S = 10.0
"""So long after its last record a worker counts as alive."""
SILENCE_S = 5.0
"""When nobody was heard of for so long, it was not for the workers' silence."""


class WorkerLiveness:
    """Times are of any one clock, in seconds.

    >>> roster = WorkerLiveness()
    >>> roster.heard(WorkerAlive("run", "a", version=3, live=8, sampled_tokens=90, seconds=9.0, idle_s=0.0), now=50.0)
    >>> roster.heard(WorkerAlive("run", "b", version=-1, live=0, sampled_tokens=0, seconds=0.0, idle_s=0.0), now=50.0)
    >>> sorted(roster.alive(now=59.9)), sorted(roster.alive(now=60.1))
    (['a'], [])
    """

    def __init__(self) -> None:
        self._last: dict[str, float] = {}
        self._anybody = 0.0
        """When the last record was read, whoever's; or when there was none, though the log was well."""

    def record_heartbeat(self, message: FromWorker, *, now: float) -> None:
        """A record of this worker was read. Read late, it counts from then: the log does not tell its age."""
        self.discount_silence(now=now)
        self._anybody = now
        if isinstance(message, WorkerAlive) and message.version < 0:
            self._last.pop(message.worker, None)
        else:
            self._last[message.worker] = now

    def discount_silence(self, *, now: float) -> None:
        """If nobody was heard of for SILENCE_S, that time does not count."""
        silence = now - self._anybody
        if silence >= SILENCE_S:
            self._last = {worker: at + silence for worker, at in self._last.items()}
            self._anybody = now

    def listened(self, *, now: float) -> None:
        """All that stands on the log was read, without a gap: whoever was not heard of is silent."""
        self._anybody = now

    def alive(self, *, now: float) -> frozenset[str]:
        """Workers heard of within ROSTER_S."""
        self._last = {worker: at for worker, at in self._last.items() if now - at <= ROSTER_S}
        return frozenset(self._last)
