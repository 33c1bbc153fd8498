"""The scoring jobs of a replica, by version. Pure.

A record has one job for each version of its tokens. Its offset may be committed only when all its jobs are done.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from palimpsest.common.bus.port import Position
from palimpsest.common.versions import Version
from palimpsest.services.learner.batch.batching import Row


@dataclass(slots=True, eq=False)
class ScoringJob:
    """The tokens of one version in one trajectory."""

    version: Version
    row: Row
    """Ends after the version's last token; only the version's tokens are trainable."""
    origin: Position | None
    """Position of its record on `trajectories`; None if a batch requested the job."""
    urgent: bool = False
    """Whether a batch waits for it."""


class ScoringQueue:
    """Jobs are taken one version at a time, so that each version is loaded once for all its jobs."""

    def __init__(self) -> None:
        self._jobs: list[ScoringJob] = []
        self._left: dict[Position, int] = {}

    def __len__(self) -> int:
        return len(self._jobs)

    def add(self, rows: Mapping[Version, Row], origin: Position) -> None:
        """Add a job for each of the rows (at least one), keyed by version. A record has a call for each of its token
        sequences."""
        self._left[origin] = self._left.get(origin, 0) + len(rows)
        self._jobs += [ScoringJob(version, row, origin) for version, row in rows.items()]

    def prioritize(self, rows: Mapping[Version, Row]) -> None:
        """Mark the jobs of these rows as urgent, because a batch waits for them.

        A row without a job gets one: its record belongs to another replica, which is probably slow or dead.
        """
        for version, row in rows.items():
            covering = [job for job in self._jobs if job.version == version and _covers(job.row, row)]
            for job in covering:
                job.urgent = True
            if not covering:
                self._jobs.append(ScoringJob(version, row, None, urgent=True))

    def versions(self, held: Version | None) -> list[Version]:
        """Versions to score, in order: versions with urgent jobs, then the `held` version, then the oldest."""
        urgent = {job.version for job in self._jobs if job.urgent}
        return sorted({job.version for job in self._jobs}, key=lambda v: (v not in urgent, v != held, v))

    def take(self, version: Version) -> list[ScoringJob]:
        """Remove and return the urgent jobs of this version, or all its jobs if none is urgent."""
        own = [job for job in self._jobs if job.version == version]
        taken = [job for job in own if job.urgent] or own
        gone = set(taken)
        self._jobs = [job for job in self._jobs if job not in gone]
        return taken

    def put_back(self, jobs: Iterable[ScoringJob]) -> None:
        """Add jobs again that were taken and not scored, unless their partition was lost meanwhile."""
        self._jobs += [job for job in jobs if job.origin is None or job.origin in self._left]

    def done(self, job: ScoringJob) -> Position | None:
        """Note that a job is published or cannot be scored. Return its record's position if it was the record's last
        job."""
        if job.origin is None or job.origin not in self._left:
            return None
        self._left[job.origin] -= 1
        if self._left[job.origin]:
            return None
        del self._left[job.origin]
        return job.origin

    def forget(self, partition: int) -> None:
        """Remove the jobs of a partition: another replica reads it now, from the committed offset."""
        self._jobs = [job for job in self._jobs if job.origin is None or job.origin.partition != partition]
        self._left = {origin: left for origin, left in self._left.items() if origin.partition != partition}


def _covers(queued: Row, requested: Row) -> bool:
    """Whether scoring `queued` gives the value of every trainable token of `requested`."""
    if queued.trajectory != requested.trajectory or len(queued.tokens) < len(requested.tokens):
        return False
    length, trainable = len(requested.tokens), requested.versions >= 0
    return bool(
        np.array_equal(queued.tokens[:length], requested.tokens)
        and (queued.versions[:length][trainable] == requested.versions[trainable]).all()
    )
