"""The state of one cut: which workers were asked, which answered, up to where the log must be read. Pure.

In a cut every worker is paused, so that the tokens of a version can be scored before its weights change. Cuts are
numbered over the whole run: an answer to a former cut does not count for the present one.
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
    """Those that were alive during the cut, or answered."""
    answered: tuple[str, ...] = ()
    late: tuple[str, ...] = ()
    """Left out: dead, or not paused by the deadline."""
    caught_up: bool = True
    """Whether everything that the workers flushed was read in time."""
    stall_s: float = 0.0
    """From the request until the weights may change."""
    tokens_scored: int = 0
    flushed: int = 0
    """Flushes of live trajectories that were resolved."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """By phase: before (scoring while workers still sample), wait (for the workers), read, score."""
    fenced: bool = False
    """Another learner has the run: no worker was asked, and this version must not be trained."""


class Cut:
    """Times are of any one clock, in seconds.

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
        self._asked: set[str] = set()
        self._answers: set[str] = set()
        self.positions: dict[int, int] = {}
        """Topic `trajectories`: partition -> offset after the last record that the workers published before they
        paused."""

    def take(self, answer: CutReached) -> bool:
        """Note an answer; False if it belongs to another cut. A second answer of a worker adds to its first."""
        if answer.cut != self.number:
            return False
        self._answers.add(answer.worker)
        for partition, offset in answer.positions.items():
            self.positions[partition] = max(offset, self.positions.get(partition, 0))
        return True

    def restart_deadline(self, *, now: float) -> None:
        """Give the workers their whole time again, after an outage of the log (outage_clock.py)."""
        self._ends_at = now + self._deadline_s

    def is_waiting(self, alive: Collection[str], *, now: float) -> bool:
        """Whether a live worker has not answered and there is time left.

        A worker that comes alive while the cut is open is asked too. The cut does not wait for one that has died.
        """
        self._asked.update(alive)
        return now < self._ends_at and not self._answers.issuperset(alive)

    @property
    def workers(self) -> tuple[str, ...]:
        """Names of the workers that were asked or answered, sorted."""
        return tuple(sorted(self._asked | self._answers))

    @property
    def answered(self) -> tuple[str, ...]:
        """Names of the paused workers, sorted."""
        return tuple(sorted(self._answers))

    @property
    def late(self) -> tuple[str, ...]:
        """Names of the workers that were asked and have not answered, sorted."""
        return tuple(sorted(self._asked - self._answers))


def next_number(control: Iterable[object]) -> int:
    """The number of the next cut, from all messages of `control`: the numbers continue after a restart.

    >>> next_number([])
    1
    >>> next_number([CutRequested("run", 1, Version(0), 5.0), CutRequested("run", 2, Version(1), 5.0)])
    3
    """
    return 1 + max((message.cut for message in control if isinstance(message, CutRequested)), default=0)
