"""The timer of the loop, the trainer and the cut: seconds by phase, without a gap."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class PhaseTimer:
    """Assigns every moment to one phase: the innermost open one, else `base`.

    So the phases add up to the time since the start, or since `take`.
    """

    clock: Callable[[], float] = time.monotonic
    base: str = "other"
    """Phase of all time outside the others."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Phase -> seconds up to the last change of the phase."""

    def __post_init__(self) -> None:
        self._phase, self._since = self.base, self.clock()

    @contextmanager
    def of(self, phase: str) -> Iterator[None]:
        """Count the block under this phase, also when it raises. Phases that open inside are not part of it."""
        outer = self._change(phase)
        try:
            yield
        finally:
            self._change(outer)

    def take(self) -> dict[str, float]:
        """Return the seconds so far and start over, in the same phase."""
        self._change(self._phase)
        seconds, self.seconds = self.seconds, {}
        return seconds

    def _change(self, phase: str) -> str:
        """Begin a phase. Return the phase that ends."""
        now, ended = self.clock(), self._phase
        self.seconds[ended] = self.seconds.get(ended, 0.0) + now - self._since
        self._phase, self._since = phase, now
        return ended
