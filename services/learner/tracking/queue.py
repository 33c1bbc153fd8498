"""Hands the lines of the history to a tracker on a thread of its own, so that the loop never waits for it."""

import queue
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from palimpsest.common.logs import logger
from palimpsest.services.learner import instruments
from palimpsest.services.learner.tracking.port import Tracker
from palimpsest.services.learner.tracking.values import values

MOST_WAITING = 1000
"""Versions that may wait for the tracker. A further one is dropped."""
CLOSE_S = 20.0
"""Time limit for the rest at the end of the run."""
QUIET_S = 60.0
"""Seconds between two log lines about errors of the tracker."""


class TrackingQueue:
    """A follower of the history (history.py). An error of the tracker drops a version and does not end the run.

    tracker: None: lines are ignored.
    """

    def __init__(self, tracker: Tracker | None, *, most_waiting: int = MOST_WAITING) -> None:
        self._tracker = tracker
        self._waiting = queue.Queue[Mapping[str, Any] | None](most_waiting)
        self._kept = 0
        self._opened = False
        self._reported = float("-inf")
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)

    def begin(self, newest: Sequence[Mapping[str, Any]]) -> None:
        """Start the thread."""
        self._kept = newest[-1]["published"] if newest else 0
        if self._tracker is not None:
            self._thread.start()

    def add(self, line: Mapping[str, Any]) -> None:
        """Hand over a version, or drop it if too many wait."""
        if self._tracker is None:
            return
        try:
            self._waiting.put_nowait(line)
        except queue.Full:
            instruments.TRACKING_DROPPED.labels("full").inc()

    @property
    def of_evaluations(self) -> "EvaluationFollower":
        """The follower of evaluations.jsonl, whose lines go to the same tracker."""
        return EvaluationFollower(self)

    def close(self, *, limit_s: float = CLOSE_S) -> None:
        """Send the rest within `limit_s` seconds. The thread does not keep the process alive."""
        if not self._thread.is_alive():
            return
        with suppress(queue.Full):
            self._waiting.put(None, timeout=limit_s)
        self._thread.join(limit_s)
        if self._thread.is_alive():
            logger().warning("tracking did not finish", versions=self._waiting.qsize(), waited_s=limit_s)

    def _work(self) -> None:
        assert self._tracker is not None
        while (line := self._waiting.get()) is not None:
            try:
                if not self._opened:
                    self._tracker.open(kept=self._kept)
                    self._opened = True
                self._tracker.log(line["published"], values(line))
            except Exception as error:  # a tracking system must not end a run
                instruments.TRACKING_DROPPED.labels("error").inc()
                self._report(error)
        if self._opened:
            try:
                self._tracker.close()
            except Exception as error:
                self._report(error)

    def _report(self, error: Exception) -> None:
        if time.monotonic() - self._reported > QUIET_S:
            self._reported = time.monotonic()
            logger().warning("tracking failed; the run continues", error=f"{type(error).__name__}: {error}")


class EvaluationFollower:
    """A follower of evaluations.jsonl. The history has begun the queue."""

    def __init__(self, lines: TrackingQueue) -> None:
        self._lines = lines

    def begin(self, newest: Sequence[Mapping[str, Any]]) -> None:
        """Earlier lines were sent before."""

    def add(self, line: Mapping[str, Any]) -> None:
        """Hand over an evaluation."""
        self._lines.add(line)
