"""Keeps the newest points of the run for the page."""

import threading
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from palimpsest.common.page.points import VersionPoint, point
from palimpsest.services.learner.observability.history import NEWEST


class PageFeed:
    """A follower of the history (history.py). The loop writes; the HTTP thread reads."""

    def __init__(self) -> None:
        self._points: deque[VersionPoint] = deque(maxlen=NEWEST)
        self._lock = threading.Lock()

    def begin(self, newest: Sequence[Mapping[str, Any]]) -> None:
        """Start with the lines of earlier starts."""
        with self._lock:
            self._points.clear()
            self._points.extend(map(point, newest))

    def add(self, line: Mapping[str, Any]) -> None:
        """Add a version."""
        with self._lock:
            self._points.append(point(line))

    def after(self, version: int) -> list[VersionPoint]:
        """Return the points of the versions after this one, oldest first."""
        with self._lock:
            return [one for one in self._points if one.version > version]
