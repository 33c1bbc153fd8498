"""Maintains seconds.json: the set-up time and the running time of a run, over all its starts."""

from pathlib import Path

import msgspec

from palimpsest.common.files import write
from palimpsest.services.report.folder import Seconds, read_seconds

SAVE_S = 5.0


class Stopwatch:
    """Adds this start to the earlier ones. `now` is any monotonic clock, in seconds.

    >>> watch = Stopwatch(Path("/nonexistent/seconds.json"), now=100.0)
    >>> watch.update(now=107.0, ready=None)
    >>> watch.seconds()
    Seconds(setup=7.0, run=0.0)
    >>> watch.update(now=150.0, ready=130.0)
    >>> watch.seconds()
    Seconds(setup=30.0, run=20.0)
    """

    def __init__(self, path: Path, *, now: float) -> None:
        self._path, self._started, self._looked, self._saved = path, now, now, now
        self._before = read_seconds(path) or Seconds()
        self._ready: float | None = None

    def update(self, *, now: float, ready: float | None) -> None:
        """Count the time until `now`. `ready`: since when a worker can sample; only the first value counts."""
        self._looked = now
        if self._ready is None and ready is not None:
            self._ready = max(self._started, ready)

    def seconds(self) -> Seconds:
        """Return the seconds of all starts up to the last update; stopping and reporting do not count."""
        ready = self._looked if self._ready is None else min(self._looked, self._ready)
        return Seconds(setup=self._before.setup + ready - self._started, run=self._before.run + self._looked - ready)

    def keep(self) -> None:
        """Save every SAVE_S seconds, because the machine can fail at any moment."""
        if self._looked - self._saved >= SAVE_S:
            self.save()

    def save(self) -> None:
        """Save for the next start."""
        self._saved = self._looked
        write(self._path, msgspec.json.encode(self.seconds()))
