"""The timer of the loop, the trainer and the cut: seconds by phase."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class PhaseTimer:
    """Adds up the seconds spent in named phases."""

    clock: Callable[[], float] = time.monotonic
    seconds: dict[str, float] = field(default_factory=dict)
    """Phase -> seconds since the start, or since `take`."""

    @contextmanager
    def of(self, phase: str) -> Iterator[None]:
        """Count the block under this phase, also when it raises."""
        started = self.clock()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + self.clock() - started

    def take(self) -> dict[str, float]:
        """Return the seconds so far and start over."""
        seconds, self.seconds = self.seconds, {}
        return seconds
