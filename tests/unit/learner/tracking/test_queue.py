"""The queue between the history and a tracker: it never blocks, counts what is dropped, and survives every error."""

import threading
from collections.abc import Mapping
from typing import Any

import pytest

from palimpsest.common.metrics import REGISTRY
from palimpsest.services.learner.tracking.queue import TrackingQueue
from tests.processes.waiting import LIMIT_S
from tests.records.history_lines import a_line


class Tracker:
    def __init__(self) -> None:
        self.did: list[Any] = []
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.failing: set[Any] = set()

    def open(self, *, kept: int) -> None:
        self._do(("open", kept))

    def log(self, version: int, values: Mapping[str, float]) -> None:
        self.entered.set()
        assert self.gate.wait(LIMIT_S)
        self._do(version)

    def close(self) -> None:
        self._do("close")

    def _do(self, what: Any) -> None:
        if what in self.failing:
            self.failing.discard(what)
            raise ConnectionError("no route")
        self.did.append(what)


def dropped(reason: str) -> float:
    return REGISTRY.get_sample_value("palimpsest_learner_tracking_dropped_total", {"reason": reason}) or 0.0


def test_a_restart_continues_after_the_lines_that_the_history_keeps() -> None:
    tracker = Tracker()
    queue = TrackingQueue(tracker)
    queue.begin([a_line(0), a_line(1)])
    queue.add(a_line(2))
    queue.close(limit_s=LIMIT_S)
    assert tracker.did == [("open", 2), 3, "close"]


def test_a_tracker_that_hangs_blocks_nothing_and_drops_are_counted() -> None:
    tracker, before = Tracker(), dropped("full")
    tracker.gate.clear()
    queue = TrackingQueue(tracker, most_waiting=2)
    queue.begin([])
    queue.add(a_line(0))
    assert tracker.entered.wait(LIMIT_S)
    for version in range(1, 6):  # two of these wait
        queue.add(a_line(version))
    assert dropped("full") - before == 3
    queue.close(limit_s=0.0)  # waits no longer: the run ends although the tracker hangs
    tracker.gate.set()


@pytest.mark.parametrize("fails", [("open", 0), 2, "close"])
def test_an_error_costs_one_version_and_nothing_else(fails: Any) -> None:
    tracker, before = Tracker(), dropped("error")
    tracker.failing = {fails}
    queue = TrackingQueue(tracker)
    queue.begin([])
    for version in range(3):
        queue.add(a_line(version))
    queue.close(limit_s=LIMIT_S)
    expected = {
        ("open", 0): [("open", 0), 2, 3, "close"],
        2: [("open", 0), 1, 3, "close"],
        "close": [("open", 0), 1, 2, 3],
    }
    assert tracker.did == expected[fails]
    assert dropped("error") - before == (fails != "close")
