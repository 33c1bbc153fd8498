"""One cut from its request to its end: who was asked, who answered, up to where the log must be read. Pure.

A cut is the moment at which every worker stands still, so that the tokens of a version can be scored before its weights
change. Cuts are numbered over the whole run: an answer to a former one says nothing about the present one.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from palimpsest.common.messages import CutReached, CutRequested
from palimpsest.common.versions import Version

MOST_LOST_S = 900.0
"""Nothing waits for ever: when so much was made up for in one cut, no more is."""


@dataclass(frozen=True, slots=True)
class CutReport:
    """What became of a cut."""

    cut: int
    version: Version
    workers: tuple[str, ...] = ()
    """Alive at some moment of it, or answered."""
    answered: tuple[str, ...] = ()
    late: tuple[str, ...] = ()
    """Left out: dead, or not standing still by the deadline."""
    caught_up: bool = True
    """Whether everything the workers flushed was read in time."""
    stall_s: float = 0.0
    """From the request until the weights may change."""
    tokens_scored: int = 0
    flushed: int = 0
    """Flushes of live trajectories that were handled."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """By phase: before (scoring what was there, workers sampling on), wait (for the workers), read, score."""
    fenced: bool = False
    """Another learner has the run: nobody was asked, nothing is to be made of this version."""


class Cut:
    """Times are of any one clock, in seconds.

    >>> cut = Cut(3, Version(7), requested_at=100.0, deadline_s=5.0)
    >>> cut.waits({"a", "b"}, now=101.0)
    True
    >>> cut.take(CutReached("run", "a", cut=3, version=7, positions={0: 12}, flushed=1, pause_s=0.1))
    True
    >>> cut.waits({"a", "b"}, now=102.0), cut.waits({"a", "b"}, now=105.0)
    (True, False)
    >>> cut.answered, cut.late, cut.positions
    (('a',), ('b',), {0: 12})
    >>> cut.begin_anew(now=165.0, lost_s=60.0)
    >>> cut.waits({"a", "b"}, now=169.0), cut.waits({"a", "b"}, now=170.0)
    (True, False)
    """

    def __init__(self, number: int, version: Version, *, requested_at: float, deadline_s: float) -> None:
        self.number, self.version = number, version
        self._deadline_s, self._ends_at, self._lost_s = deadline_s, requested_at + deadline_s, 0.0
        self._asked: set[str] = set()
        self._answers: set[str] = set()
        self.positions: dict[int, int] = {}
        """Topic `trajectories`: partition -> offset after the last record that any worker told of."""

    def take(self, answer: CutReached) -> bool:
        """Note an answer; False if it is to another cut. A worker that answers again adds to what it said."""
        if answer.cut != self.number:
            return False
        self._answers.add(answer.worker)
        for partition, offset in answer.positions.items():
            self.positions[partition] = max(offset, self.positions.get(partition, 0))
        return True

    def restart_deadline(self, *, now: float, lost_s: float) -> None:
        """For so long nobody could be heard: the workers have their whole time from now on."""
        if self._lost_s < MOST_LOST_S:
            self._ends_at = now + self._deadline_s
        self._lost_s += lost_s

    def is_waiting(self, alive: Collection[str], *, now: float) -> bool:
        """Whether some worker that is alive has not answered, and there is time left.

        One that comes alive while the cut is open is asked too, one that falls silent is waited for no longer.
        """
        self._asked.update(alive)
        return now < self._ends_at and not self._answers.issuperset(alive)

    @property
    def workers(self) -> tuple[str, ...]:
        """All that were asked or answered, by name."""
        return tuple(sorted(self._asked | self._answers))

    @property
    def answered(self) -> tuple[str, ...]:
        """Those standing still, by name."""
        return tuple(sorted(self._answers))

    @property
    def late(self) -> tuple[str, ...]:
        """Those asked that have not answered so far, by name."""
        return tuple(sorted(self._asked - self._answers))


def next_number(control: Iterable[object]) -> int:
    """The next cut's number, from all messages of `control`: cuts go on counting after a restart.

    >>> next_number([])
    1
    >>> next_number([CutRequested("run", 1, Version(0), 5.0), CutRequested("run", 2, Version(1), 5.0)])
    3
    """
    return 1 + max((message.cut for message in control if isinstance(message, CutRequested)), default=0)
