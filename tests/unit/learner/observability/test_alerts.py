"""Alerts go to the log, the history line, and the metric; a restart continues their state."""

from pathlib import Path

import msgspec
import pytest
import structlog
from structlog.testing import capture_logs

from palimpsest.common.metrics import REGISTRY
from palimpsest.services.learner.observability.alert_rules import LEAST_VERSIONS, PERSISTS, WINDOW
from palimpsest.services.learner.observability.alerts import AlertTracker
from tests.unit.learner.observability.test_alert_rules import Line, a_line, run, with_same


def level(rule: str) -> float | None:
    return REGISTRY.get_sample_value("palimpsest_learner_alert", {"rule": rule})


def evaluate_lines(tracker: AlertTracker, lines: list[Line]) -> list[structlog.typing.EventDict]:
    with capture_logs() as events:
        for line in lines:
            tracker.evaluate(line)
    return list(events)


def wrong(first: int, count: int) -> list[Line]:
    return [a_line(first + i, token_masked=lambda age: 0.1 * age) for i in range(count)]


def test_an_alert_is_logged_when_it_begins_and_when_it_ends() -> None:
    tracker = AlertTracker()
    lines = wrong(0, 20)
    events = evaluate_lines(tracker, lines)
    assert [(event["log_level"], event["event"], event["rule"]) for event in events] == [
        ("warning", "alert", "mask_by_staleness")
    ]
    assert events[0]["says"].startswith("the masked share of tokens changes by +10.0 points")
    assert [len(line["alerts"]) for line in lines] == [0] * (LEAST_VERSIONS - 1) + [1] * (21 - LEAST_VERSIONS)
    assert lines[-1]["alerts"][0]["level"] == "warning"
    assert level("mask_by_staleness") == 1
    events = evaluate_lines(tracker, [a_line(20 + i) for i in range(WINDOW)])
    assert [(event["log_level"], event["event"], event["rule"]) for event in events] == [
        ("info", "alert over", "mask_by_staleness")
    ]
    assert level("mask_by_staleness") == 0


def test_a_notice_is_logged_once_and_is_no_alert() -> None:
    lines = with_same(run(40, kind="bypass"), 1.0)
    events = evaluate_lines(AlertTracker(), lines)
    assert [(event["log_level"], event["event"]) for event in events] == [("info", "notice")]
    assert [line["version"] for line in lines if line["alerts"]] == [PERSISTS - 1]
    assert level("discrepancy_is_one") == 0


@pytest.mark.parametrize("kept", [5, 12, 25])
def test_a_restart_repeats_no_alert_and_loses_none(tmp_path: Path, kept: int) -> None:
    """Wherever the restart happens, the lines equal those of an uninterrupted run."""
    expected = wrong(0, 30)
    expected_events = [(event["event"], event["rule"]) for event in evaluate_lines(AlertTracker(), expected)]
    parts = wrong(0, 30)
    first = evaluate_lines(AlertTracker(), parts[:kept])
    history = tmp_path / "history.jsonl"
    history.write_bytes(b"".join(msgspec.json.encode(line) + b"\n" for line in parts[:kept]))
    tracker = AlertTracker()
    tracker.start(history)
    second = evaluate_lines(tracker, parts[kept:])
    assert [(event["event"], event["rule"]) for event in [*first, *second]] == expected_events
    assert [line["alerts"] for line in parts] == [line["alerts"] for line in expected]


def test_a_notice_is_not_repeated_after_a_restart(tmp_path: Path) -> None:
    lines = with_same(run(30, kind="bypass"), 1.0)
    evaluate_lines(AlertTracker(), lines[:10])
    history = tmp_path / "history.jsonl"
    history.write_bytes(b"".join(msgspec.json.encode(line) + b"\n" for line in lines[:10]))
    tracker = AlertTracker()
    tracker.start(history)
    assert evaluate_lines(tracker, lines[10:]) == []


def test_a_new_run_has_no_history(tmp_path: Path) -> None:
    tracker = AlertTracker()
    tracker.start(tmp_path / "history.jsonl")
    assert evaluate_lines(tracker, run(3)) == []
    assert level("fallback") == 0


def test_an_unreadable_history_is_logged_and_skipped(tmp_path: Path) -> None:
    (tmp_path / "history.jsonl").write_bytes(b'{"version": \n')
    tracker = AlertTracker()
    with capture_logs() as events:
        tracker.start(tmp_path / "history.jsonl")
    assert [event["event"] for event in events] == ["alerts restarted: the history cannot be read"]
    assert evaluate_lines(tracker, run(3)) == []
