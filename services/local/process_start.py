"""Tracks one start of a process by its status replies: when it became ready, and whether it has worked. Pure.

Invariant: a process has worked only if it became ready in this start *and* the run made progress afterward. A long
start-up or a long wait therefore never resets the count of crashes.
"""

from dataclasses import dataclass

from palimpsest.services.live.poller import ServiceObservation

STEADY_S = 600.0
"""A process other than the learner has worked once it was ready for this time, even without a new version."""
STARTS = ("the start", "the engine", "the model")
"""Values of `waiting_for` of learner, worker and replica while they start."""
WORK = {"rollout": "sampled_tokens", "replica": "scored_tokens"}
"""Service -> the status field that counts its work, from 0 at each start. The process is ready once the count is above
0, because an engine can die at its first request."""


@dataclass(slots=True)
class ProcessStart:
    """The progress of one start. Times are time.monotonic()."""

    started: float
    versions: int
    """Number of versions that the run had trained at the start."""
    ready: float | None = None
    worked: bool = False
    trains: bool = False
    """Whether the process is the learner: every new version is its work, whether or not it replies."""

    def observe(self, seen: ServiceObservation, *, versions: int, now: float) -> None:
        """Update with the newest status reply. versions: number of versions that the run has trained by now."""
        if self._is_past_startup(seen):
            self.ready = now if self.ready is None else self.ready
        progressed = versions > self.versions
        if self.trains:
            self.worked = self.worked or progressed
        elif self.ready is not None:
            self.worked = self.worked or progressed or now - self.ready >= STEADY_S

    def _is_past_startup(self, seen: ServiceObservation) -> bool:
        """Whether a reply of this start, not of an earlier one, shows that start-up is over."""
        answer = seen.last
        if answer is None or answer.at < self.started:
            return False
        if answer.status.get("starting") or answer.status.get("waiting_for") in STARTS:
            return False
        service = answer.status.get("service")
        return service not in WORK or bool(answer.status.get(WORK[service]))
