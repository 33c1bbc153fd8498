"""The state of one cut: requested workers, workers that answered, offsets up to which the log must be read. Pure.

In a cut every worker is paused, so that the tokens of a version can be scored before its weights change. The numbers of
cuts are unique in a run, so that an answer to an earlier cut does not count for the current one.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from palimpsest.common.messages import CutReached, CutRequested
from palimpsest.common.versions import Version


@dataclass(frozen=True, slots=True)
class CutReport:
    """The outcome of a cut."""

    cut: int
    version: Version
    workers: tuple[str, ...] = ()
    """Names of the workers that were alive during the cut or answered it."""
    answered: tuple[str, ...] = ()
    """Names of the workers that answered."""
    late: tuple[str, ...] = ()
    """Names of the workers that the cut left out: dead, or not paused by the deadline."""
    caught_up: bool = True
    """Whether all flushes of the workers were read in time."""
    stall_s: float = 0.0
    """Seconds from the request until the weights may change."""
    tokens_scored: int = 0
    """Tokens scored before and during the cut."""
    flushed: int = 0
    """Flushes of live trajectories that were resolved."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Phase -> seconds: before (scoring while workers still sample), wait (for the workers), read, score."""
    fenced: bool = False
    """Another learner has the run: no worker got a request, and this version must not be trained."""


class Cut:
    """Collects the answers to one cut. Times are seconds of any one clock.

    >>> cut = Cut(3, Version(7), requested_at=100.0, deadline_s=5.0)
    >>> cut.is_waiting({"a", "b"}, now=101.0)
    True
    >>> cut.take(CutReached("run", "a", cut=3, version=7, positions={0: 12}, flushed=1, pause_s=0.1))
    True
    >>> cut.is_waiting({"a", "b"}, now=102.0), cut.is_waiting({"a", "b"}, now=105.0)
    (True, False)
    >>> cut.answered, cut.late, cut.positions
    (('a',), ('b',), {0: 12})
    >>> cut.restart_deadline(now=165.0)
    >>> cut.is_waiting({"a", "b"}, now=169.0), cut.is_waiting({"a", "b"}, now=170.0)
    (True, False)
    """

    def __init__(self, number: int, version: Version, *, requested_at: float, deadline_s: float) -> None:
        self.number, self.version = number, version
        self._deadline_s, self._ends_at = deadline_s, requested_at + deadline_s
        self._requested: set[str] = set()
        self._answers: set[str] = set()
        self.positions: dict[int, int] = {}
        """Topic `trajectories`: partition -> offset after the last record that the workers published before they
        paused."""

    def take(self, answer: CutReached) -> bool:
        """Record an answer. Return False if it belongs to another cut. Offsets of repeated answers are merged."""
        if answer.cut != self.number:
            return False
        self._answers.add(answer.worker)
        for partition, offset in answer.positions.items():
            self.positions[partition] = max(offset, self.positions.get(partition, 0))
        return True

    def restart_deadline(self, *, now: float) -> None:
        """Give the workers the full deadline again, after an outage of the log (outage_clock.py)."""
        self._ends_at = now + self._deadline_s

    def is_waiting(self, alive: Collection[str], *, now: float) -> bool:
        """Whether a live worker has not answered and there is time left.

        A worker that starts while the cut is open also gets the request. The cut does not wait for a dead worker.
        """
        self._requested.update(alive)
        return now < self._ends_at and not self._answers.issuperset(alive)

    @property
    def workers(self) -> tuple[str, ...]:
        """Names of the workers that got the request or answered, sorted."""
        return tuple(sorted(self._requested | self._answers))

    @property
    def answered(self) -> tuple[str, ...]:
        """Names of the paused workers, sorted."""
        return tuple(sorted(self._answers))

    @property
    def late(self) -> tuple[str, ...]:
        """Names of the workers that got the request and have not answered, sorted."""
        return tuple(sorted(self._requested - self._answers))


def next_number(control: Iterable[object]) -> int:
    """Return the number of the next cut, given all messages of `control`. Numbers continue after a restart.

    >>> next_number([])
    1
    >>> next_number([CutRequested("run", 1, Version(0), 5.0), CutRequested("run", 2, Version(1), 5.0)])
    3
    """
    return 1 + max((message.cut for message in control if isinstance(message, CutRequested)), default=0)
