"""What a replica has read and not scored yet, by version. Pure.

A record on the log is done when all its versions are: only then may its offset be committed.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from palimpsest.common.bus.port import Position
from palimpsest.common.versions import Version
from palimpsest.services.learner.batch.batching import Row


@dataclass(slots=True, eq=False)
class ScoringJob:
    """One trajectory's tokens of one version."""

    version: Version
    row: Row
    """Cut after the version's last token; no other token is trainable."""
    origin: Position | None
    """Where its record stands; None: it was asked for."""
    urgent: bool = False
    """A batch waits for it."""


class ScoringQueue:
    """Taken one version at a time, so that each has to be loaded once for all that waits for it."""

    def __init__(self) -> None:
        self._works: list[ScoringJob] = []
        self._left: dict[Position, int] = {}

    def __len__(self) -> int:
        return len(self._works)

    def add(self, rows: Mapping[Version, Row], origin: Position) -> None:
        """A record's rows (at least one), each to be scored by its version."""
        self._left[origin] = len(rows)
        self._works += [ScoringJob(version, row, origin) for version, row in rows.items()]

    def prioritize(self, rows: Mapping[Version, Row]) -> None:
        """A batch waits for these: they come first now. What does not wait here anyway is another replica's, most
        likely a slow or dead one's."""
        for version, row in rows.items():
            same = [work for work in self._works if work.version == version and _same(work.row, row)]
            for work in same:
                work.urgent = True
            if not same:
                self._works.append(ScoringJob(version, row, None, urgent=True))

    def versions(self, held: Version | None) -> list[Version]:
        """Those to score, in order: what a batch waits for, then the version that is held, then the oldest."""
        urgent = {work.version for work in self._works if work.urgent}
        return sorted({work.version for work in self._works}, key=lambda v: (v not in urgent, v != held, v))

    def take(self, version: Version) -> list[ScoringJob]:
        """What a batch waits for of this version, or else everything of it; it waits no longer."""
        own = [work for work in self._works if work.version == version]
        taken = [work for work in own if work.urgent] or own
        gone = set(taken)
        self._works = [work for work in self._works if work not in gone]
        return taken

    def put_back(self, works: Iterable[ScoringJob]) -> None:
        """These were taken and are not scored: they wait again, unless their partition was lost meanwhile."""
        self._works += [work for work in works if work.origin is None or work.origin in self._left]

    def done(self, work: ScoringJob) -> Position | None:
        """The work is published, or can never be; its record's place if that was the last of it."""
        if work.origin is None or work.origin not in self._left:
            return None
        self._left[work.origin] -= 1
        if self._left[work.origin]:
            return None
        del self._left[work.origin]
        return work.origin

    def forget(self, partition: int) -> None:
        """Another replica has this partition now and reads it again from what was committed."""
        self._works = [work for work in self._works if work.origin is None or work.origin.partition != partition]
        self._left = {origin: left for origin, left in self._left.items() if origin.partition != partition}


def _same(one: Row, other: Row) -> bool:
    """Whether scoring the first gives everything that is asked of the second."""
    if one.trajectory != other.trajectory or len(one.tokens) < len(other.tokens):
        return False
    length, asked = len(other.tokens), other.versions >= 0
    return bool(
        np.array_equal(one.tokens[:length], other.tokens)
        and (one.versions[:length][asked] == other.versions[asked]).all()
    )
