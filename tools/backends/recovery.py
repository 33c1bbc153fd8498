"""Progress of a starting server, and the time limit without progress. Pure."""

import re

PARTITION = re.compile(r"\((\d+)/(\d+) completed in ")
SEGMENT = re.compile(r"Recovering unflushed segment \d+\. (\d+) recovered for ")


class LogRecovery:
    """Progress of Kafka's recovery of partitions after a kill, from its log. Other lines are no progress."""

    def __init__(self) -> None:
        self._steps = 0
        self._partitions = ""
        self._segments = ""

    def read(self, line: str) -> None:
        """Process the next line of the log."""
        if found := PARTITION.search(line):
            self._partitions, self._segments = f"{found[1]} of {found[2]} partitions", ""
        elif found := SEGMENT.search(line):
            self._segments = f"{found[1]} segments of another"
        else:
            return
        self._steps += 1

    @property
    def steps(self) -> int:
        """Number of recovery steps so far."""
        return self._steps

    @property
    def progress(self) -> str:
        """Progress as text: `12 of 240 partitions, 3 segments of another`. Empty before the first step."""
        return ", ".join(part for part in (self._partitions, self._segments) if part)


class ProgressLimit:
    """A time limit that restarts with every step."""

    def __init__(self, limit_s: float, now: float) -> None:
        self.limit_s = limit_s
        self._steps = 0
        self._moved = now

    def ended(self, steps: int, now: float) -> bool:
        """Return whether the number of steps has not changed for `limit_s` seconds."""
        if steps != self._steps:
            self._steps, self._moved = steps, now
        return now - self._moved > self.limit_s
