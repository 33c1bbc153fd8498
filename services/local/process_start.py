"""One start of a process, as far as its answers tell: when it became ready, and whether it has worked. Pure.

Invariant: a process has worked only if it became ready in this start *and* afterwards the run went on, so that no
start-up, however long, and no waiting forgives a crash.
"""

from dataclasses import dataclass

from palimpsest.services.live.poller import ServiceObservation

STEADY_S = 600.0
"""Any but the learner, ready for so long, has worked, even if no version came in that time."""
STARTS = ("the start", "the engine", "the model")
"""What learner, worker and replica wait for while they start."""
WORK = {"rollout": "sampled_tokens", "replica": "scored_tokens"}
"""Service -> what it counts of its own work, from 0 at each start. It is ready once that is more than 0: an engine that
dies at its first request was never of use."""


@dataclass(slots=True)
class ProcessStart:
    """Of one start. Times are time.monotonic()."""

    started: float
    versions: int
    """Versions that the run had trained when it started."""
    ready: float | None = None
    worked: bool = False
    trains: bool = False
    """Whether it is the learner: every version that comes is its work, heard of by an answer or not."""

    def observe(self, seen: ServiceObservation, *, versions: int, now: float) -> None:
        """Take in what the process said newest. versions: that the run has trained by now."""
        if self._is_past_startup(seen):
            self.ready = now if self.ready is None else self.ready
        went_on = versions > self.versions
        if self.trains:
            self.worked = self.worked or went_on
        elif self.ready is not None:
            self.worked = self.worked or went_on or now - self.ready >= STEADY_S

    def _is_past_startup(self, seen: ServiceObservation) -> bool:
        """Whether this start, not the one before it, said that it is past its start."""
        answer = seen.last
        if answer is None or answer.at < self.started:
            return False
        if answer.status.get("starting") or answer.status.get("waiting_for") in STARTS:
            return False
        service = answer.status.get("service")
        return service not in WORK or bool(answer.status.get(WORK[service]))
