"""Judges each version's line by the alert rules, and tells people: in the log, in the line itself, as a metric."""

from collections import deque
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec

from palimpsest.common.logs import logger
from palimpsest.services.learner import instruments
from palimpsest.services.learner.observability.alert_rules import RULES, WINDOW, judge
from palimpsest.services.learner.observability.thresholds import RunThresholds
from palimpsest.services.learner.observability.version_record import Batch, version_record
from palimpsest.services.learner.training.results import StepResult

Line = dict[str, Any]


class AlertTracker:
    """Of one run. It remembers nothing but lines, so that a restart goes on where it was."""

    def __init__(self) -> None:
        self._lines: deque[Line] = deque(maxlen=WINDOW)
        for rule in RULES:
            instruments.ALERT.labels(rule).set(0)

    def start(self, history: Path) -> None:
        """Take the newest lines from history.jsonl, once it holds what counts."""
        try:
            newest = history.read_bytes().splitlines()[-WINDOW:]
        except FileNotFoundError:
            return
        try:
            self._lines.extend(msgspec.json.decode(line) for line in newest)
        except msgspec.DecodeError as error:
            logger().warning("alerts begin anew: the history cannot be read", file=str(history), error=str(error))
            self._lines.clear()
        self._show({alert["rule"] for alert in self._last() if alert["level"] == "warning"})

    def evaluate(self, line: Line) -> None:
        """Judge the line and put what is found into its `alerts`; say what has begun and what has ended."""
        before = {alert["rule"] for alert in self._last() if alert["level"] == "warning"}
        self._lines.append(line)
        found = judge(list(self._lines))
        line["alerts"] = [asdict(alert) | {"value": float(f"{alert.value:.5g}")} for alert in found]
        for alert in found:
            if alert.level == "notice":
                logger().info("notice", rule=alert.rule, says=alert.says)
            elif alert.rule not in before:
                logger().warning("alert", rule=alert.rule, says=alert.says)
        now = {alert.rule for alert in found if alert.level == "warning"}
        for rule in sorted(before - now):
            logger().info("alert over", rule=rule)
        self._show(now)

    def _last(self) -> list[dict[str, Any]]:
        alerts: list[dict[str, Any]] = self._lines[-1].get("alerts", []) if self._lines else []
        return alerts

    def _show(self, now: set[str]) -> None:
        for rule in RULES:
            instruments.ALERT.labels(rule).set(rule in now)


class VersionReporter:
    """`history` is history.jsonl, `bounds` are the run's."""

    def __init__(self, bounds: RunThresholds, history: Path) -> None:
        self._bounds, self._history, self._alarm = bounds, history, AlertTracker()

    def start(self) -> None:
        """Go on from the history, once it holds what counts."""
        self._alarm.start(self._history)

    def line(self, batch: Batch, trained: StepResult, **facts: Any) -> dict[str, Any]:
        """The line with its alerts, which are logged as they begin and end. facts: see `describe`."""
        line = version_record(batch, trained, bounds=self._bounds, **facts)
        self._alarm.evaluate(line)
        return line
