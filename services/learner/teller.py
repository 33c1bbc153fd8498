"""Makes each version's line, judged by the alert rules. One for rank 0."""

from pathlib import Path
from typing import Any

from services.learner.alarm import Alarm
from services.learner.bounds import Bounds
from services.learner.describe import Batch, describe
from services.learner.scored import Trained


class Teller:
    """`history` is history.jsonl, `bounds` are the run's."""

    def __init__(self, bounds: Bounds, history: Path) -> None:
        self._bounds, self._history, self._alarm = bounds, history, Alarm()

    def start(self) -> None:
        """Go on from the history, once it holds what counts."""
        self._alarm.start(self._history)

    def line(self, batch: Batch, trained: Trained, **facts: Any) -> dict[str, Any]:
        """The line with its alerts, which are logged as they begin and end. facts: see `describe`."""
        line = describe(batch, trained, bounds=self._bounds, **facts)
        self._alarm.look(line)
        return line
