"""Follows a run's history and keeps only what the view needs: a line has 20 kB, and a run has tens of thousands."""

import contextlib
import math
from array import array
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from palimpsest.services.report.history_line import Line, UnreadableLine, parse_line
from palimpsest.services.report.summary import is_first_after_start

PACE = 20
"""Number of versions over which the learner's pace is measured."""


@dataclass(frozen=True, slots=True)
class VersionPace:
    """The values of one version that the pace needs."""

    seconds: float
    """The run's seconds when the version was trained."""
    tokens: int
    begins: bool
    """Whether it is the first version after a start of the learner."""
    arrived: float
    """time.monotonic() when its line was read; -inf if the line is older than the view."""


@dataclass(frozen=True, slots=True)
class TrainedVersions:
    """The versions trained so far."""

    versions: int = 0
    success: Sequence[float] = ()
    """Success rate of each version's batch; `reward` likewise."""
    reward: Sequence[float] = ()
    skipped: int = 0
    """Number of skipped optimizer steps so far."""
    newest: tuple[VersionPace, ...] = ()
    """The newest PACE + 1 versions."""
    last: Line | None = None
    """The newest version's line."""


class HistoryAccumulator:
    """Accumulates history lines; keeps two numbers of each line, and more of the newest."""

    def __init__(self) -> None:
        self._success, self._reward, self._skipped = array("d"), array("d"), 0
        self._newest: deque[VersionPace] = deque(maxlen=PACE + 1)
        self._last: Line | None = None

    def add(self, line: Line, *, arrived: float) -> None:
        """Add the next version's line."""
        self._success.append(line["successes"].count("1") / line["batch"])
        self._reward.append(line["reward"])
        self._skipped += line["skipped"]
        self._newest.append(VersionPace(line["seconds"], line["tokens"], is_first_after_start(line), arrived))
        self._last = line

    def snapshot(self) -> TrainedVersions:
        """Return a copy that later lines do not change."""
        return TrainedVersions(
            len(self._success), self._success[:], self._reward[:], self._skipped, tuple(self._newest), self._last
        )


def accumulate(lines: Iterable[Line], *, arrived: float = math.inf) -> TrainedVersions:
    """Return the accumulated values of these lines."""
    accumulator = HistoryAccumulator()
    for line in lines:
        accumulator.add(line, arrived=arrived)
    return accumulator.snapshot()


class HistoryTail:
    """Follows a history file that grows, and that a restart of the learner truncates."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._reset()
        self._first = True

    def _reset(self) -> None:
        self._last, self._last_at = b"", 0
        self._accumulator = HistoryAccumulator()

    def read(self, now: float) -> TrainedVersions:
        """Read the complete lines added since; after a truncation, read from the start. `now`: time.monotonic().

        Lines that cannot be read are left out.
        """
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
                    with contextlib.suppress(UnreadableLine):  # the report names it; the view must not end the run
                        self._accumulator.add(parse_line(line), arrived=arrived)
                    self._last, self._last_at = line, at
                    at += len(line)
        except FileNotFoundError:
            pass
        return self._accumulator.snapshot()
