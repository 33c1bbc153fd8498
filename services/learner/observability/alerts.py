"""Evaluates the alert rules on each version's line and reports alerts: in the log, in the line and as a metric."""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec

from palimpsest.common.logs import logger
from palimpsest.services.learner import instruments
from palimpsest.services.learner.observability.alert_rules import RULES, WINDOW, judge, unknown_rules
from palimpsest.services.learner.observability.thresholds import RunThresholds
from palimpsest.services.learner.observability.version_record import Batch, version_record
from palimpsest.services.learner.training.results import StepResult

Line = dict[str, Any]


class AlertTracker:
    """The alerts of one run. Its only state is the newest lines, so that a restart continues from the history."""

    def __init__(self) -> None:
        self._lines: deque[Line] = deque(maxlen=WINDOW)
        for rule in RULES:
            instruments.ALERT.labels(rule).set(0)

    def start(self, history: Path) -> None:
        """Read the newest lines of history.jsonl. Call it after the history is truncated to the checkpoint."""
        try:
            newest = history.read_bytes().splitlines()[-WINDOW:]
        except FileNotFoundError:
            return
        try:
            self._lines.extend(msgspec.json.decode(line) for line in newest)
        except msgspec.DecodeError as error:
            logger().warning("alerts restarted: the history cannot be read", file=str(history), error=str(error))
            self._lines.clear()
        self._export(self._active(), [])

    def evaluate(self, line: Line) -> None:
        """Set the line's `alerts`; log each alert that begins or ends."""
        before = self._active()
        self._lines.append(line)
        found = judge(list(self._lines))
        line["unknown_alerts"] = unknown_rules(line)
        line["alerts"] = [asdict(alert) | {"value": float(f"{alert.value:.5g}")} for alert in found]
        for alert in found:
            if alert.level == "notice":
                logger().info("notice", rule=alert.rule, says=alert.says)
            elif alert.rule not in before:
                logger().warning("alert", rule=alert.rule, says=alert.says)
        now = {alert.rule for alert in found if alert.level == "warning"}
        for rule in sorted(before - now):
            logger().info("alert over", rule=rule)
        self._export(now, line["unknown_alerts"])

    def _active(self) -> set[str]:
        """Rules whose alert is on at the newest line."""
        alerts: list[dict[str, Any]] = self._lines[-1].get("alerts", []) if self._lines else []
        return {alert["rule"] for alert in alerts if alert["level"] == "warning"}

    def _export(self, active: set[str], unknown: Sequence[str]) -> None:
        for rule in RULES:
            known = rule in active or rule not in unknown
            instruments.ALERT.labels(rule).set(float(rule in active) if known else math.nan)


class VersionReporter:
    """Makes each version's line, with its alerts."""

    def __init__(self, thresholds: RunThresholds, history: Path) -> None:
        self._thresholds, self._history, self._tracker = thresholds, history, AlertTracker()

    def start(self) -> None:
        """Read the newest lines of the history. Call it after the history is truncated to the checkpoint."""
        self._tracker.start(self._history)

    def use(self, thresholds: RunThresholds) -> None:
        """Compare with these bounds from the next line on."""
        self._thresholds = thresholds

    def line(self, batch: Batch, trained: StepResult, **facts: Any) -> dict[str, Any]:
        """Return the version's line with its alerts. facts: see `version_record`."""
        line = version_record(batch, trained, bounds=self._thresholds, **facts)
        self._tracker.evaluate(line)
        return line
