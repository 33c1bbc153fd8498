"""What a tracker does. One thread calls it, and any error of it costs values and nothing else."""

from collections.abc import Mapping
from typing import Protocol


class Tracker(Protocol):
    """One run in a tracking system."""

    def open(self, *, kept: int) -> None:
        """Begin the run, or continue it.

        kept: newest version that the history holds, 0 without any. Later ones may have been logged before a crash; they
        are trained again.
        """

    def log(self, version: int, values: Mapping[str, float]) -> None:
        """Log the values of a version."""

    def close(self) -> None:
        """Send what is buffered."""
