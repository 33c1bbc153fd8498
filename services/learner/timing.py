"""Where a version's seconds go."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from palimpsest.services.learner import instruments


@dataclass
class PhaseTimer:
    """Seconds of the present version, by what they were spent on."""

    spent: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def of(self, phase: str) -> Iterator[None]:
        """Count the block under this phase."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.spent[phase] = self.spent.get(phase, 0.0) + time.monotonic() - started

    def take(self) -> dict[str, float]:
        """The seconds so far; the next version begins."""
        spent, self.spent = self.spent, {}
        for phase, seconds in spent.items():
            instruments.PHASE_SECONDS.labels(phase).observe(seconds)
        return spent
