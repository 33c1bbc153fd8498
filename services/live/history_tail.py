"""What the view keeps of a run's history: a line has some 20 kB and a run tens of thousands of them."""

import math
from array import array
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from palimpsest.services.report.folder import Line
from palimpsest.services.report.summary import is_first_after_start

PACE = 20
"""Versions over which the learner's pace is measured."""


@dataclass(frozen=True, slots=True)
class VersionPace:
    """What the pace needs of one version."""

    seconds: float
    """Of the run, when the version was trained."""
    tokens: int
    begins: bool
    """It is the first after a start of the learner."""
    arrived: float
    """time.monotonic() when its line was read; -inf when it stood there before."""


@dataclass(frozen=True, slots=True)
class TrainedVersions:
    """The versions trained so far."""

    versions: int = 0
    success: Sequence[float] = ()
    """Of each version's batch, like `reward`."""
    reward: Sequence[float] = ()
    skipped: int = 0
    """Optimizer steps left out so far."""
    newest: tuple[VersionPace, ...] = ()
    """The newest PACE + 1 versions."""
    last: Line | None = None
    """The newest version's line."""


class HistoryAccumulator:
    """Takes lines in, one after another; keeps two numbers of each, and more of the newest."""

    def __init__(self) -> None:
        self._success, self._reward, self._skipped = array("d"), array("d"), 0
        self._newest: deque[VersionPace] = deque(maxlen=PACE + 1)
        self._last: Line | None = None

    def add(self, line: Line, *, arrived: float) -> None:
        """The next version's line."""
        self._success.append(line["successes"].count("1") / line["batch"])
        self._reward.append(line["reward"])
        self._skipped += line["skipped"]
        self._newest.append(VersionPace(line["seconds"], line["tokens"], is_first_after_start(line), arrived))
        self._last = line

    def snapshot(self) -> TrainedVersions:
        """A copy that later lines do not change."""
        return TrainedVersions(
            len(self._success), self._success[:], self._reward[:], self._skipped, tuple(self._newest), self._last
        )


def accumulate(lines: Iterable[Line], *, arrived: float = math.inf) -> TrainedVersions:
    """Of these lines."""
    taken = HistoryAccumulator()
    for line in lines:
        taken.add(line, arrived=arrived)
    return taken.snapshot()


class HistoryTail:
    """Follows a history file that grows, and that a restart of the learner cuts back."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._reset()
        self._first = True

    def _reset(self) -> None:
        self._last, self._last_at = b"", 0
        self._gathered = HistoryAccumulator()

    def read(self, now: float) -> TrainedVersions:
        """Take in whole lines that were added; after a cut, begin anew. `now`: by time.monotonic()."""
        arrived = -math.inf if self._first else now
        self._first = False
        try:
            with self._path.open("rb") as file:
                file.seek(self._last_at)
                if file.read(len(self._last)) != self._last:
                    self._reset()
                    file.seek(0)
                    arrived = -math.inf
                at = file.tell()
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    self._gathered.add(msgspec.json.decode(line), arrived=arrived)
                    self._last, self._last_at = line, at
                    at += len(line)
        except FileNotFoundError:
            pass
        return self._gathered.snapshot()
