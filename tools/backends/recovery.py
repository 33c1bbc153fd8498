"""How far a starting server is, and how long it is waited for. Pure."""

import re

PARTITION = re.compile(r"\((\d+)/(\d+) completed in ")
SEGMENT = re.compile(r"Recovering unflushed segment \d+\. (\d+) recovered for ")


class LogRecovery:
    """What Kafka's log says of the recovery of its partitions after a kill. Lines of other kinds are no progress."""

    def __init__(self) -> None:
        self._steps = 0
        self._partitions = ""
        self._segments = ""

    def read(self, line: str) -> None:
        """Take the next line of the server's log."""
        if found := PARTITION.search(line):
            self._partitions, self._segments = f"{found[1]} of {found[2]} partitions", ""
        elif found := SEGMENT.search(line):
            self._segments = f"{found[1]} segments of another"
        else:
            return
        self._steps += 1

    @property
    def steps(self) -> int:
        """Steps seen so far; grows as long as the recovery moves."""
        return self._steps

    @property
    def said(self) -> str:
        """For a person: `12 of 240 partitions, 3 segments of another`; empty before the first step."""
        return ", ".join(part for part in (self._partitions, self._segments) if part)


class Patience:
    """Ends when nothing has moved for `limit_s` seconds."""

    def __init__(self, limit_s: float, now: float) -> None:
        self.limit_s = limit_s
        self._steps = 0
        self._moved = now

    def ended(self, steps: int, now: float) -> bool:
        """Whether the server, which has come this far by now, is given up."""
        if steps != self._steps:
            self._steps, self._moved = steps, now
        return now - self._moved > self.limit_s
