"""Alerts reach people: the log, the line, the metric; and a restart goes on where it was."""

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


def looked(alarm: AlertTracker, lines: list[Line]) -> list[structlog.typing.EventDict]:
    with capture_logs() as said:
        for line in lines:
            alarm.evaluate(line)
    return list(said)


def wrong(first: int, count: int) -> list[Line]:
    return [a_line(first + i, token_masked=lambda age: 0.1 * age) for i in range(count)]


def test_an_alert_is_logged_when_it_begins_and_when_it_ends() -> None:
    alarm = AlertTracker()
    lines = wrong(0, 20)
    said = looked(alarm, lines)
    assert [(event["log_level"], event["event"], event["rule"]) for event in said] == [
        ("warning", "alert", "mask_by_staleness")
    ]
    assert said[0]["says"].startswith("the masked share of tokens changes by +10.0 points")
    assert [len(line["alerts"]) for line in lines] == [0] * (LEAST_VERSIONS - 1) + [1] * (21 - LEAST_VERSIONS)
    assert lines[-1]["alerts"][0]["level"] == "warning"
    assert level("mask_by_staleness") == 1
    said = looked(alarm, [a_line(20 + i) for i in range(WINDOW)])
    assert [(event["log_level"], event["event"], event["rule"]) for event in said] == [
        ("info", "alert over", "mask_by_staleness")
    ]
    assert level("mask_by_staleness") == 0


def test_a_notice_is_logged_once_and_is_no_alert() -> None:
    lines = with_same(run(40, kind="bypass"), 1.0)
    said = looked(AlertTracker(), lines)
    assert [(event["log_level"], event["event"]) for event in said] == [("info", "notice")]
    assert [line["version"] for line in lines if line["alerts"]] == [PERSISTS - 1]
    assert level("discrepancy_is_one") == 0


@pytest.mark.parametrize("kept", [5, 12, 25])
def test_a_restart_says_nothing_twice_and_forgets_nothing(tmp_path: Path, kept: int) -> None:
    """Whatever part of the run the first process did, the lines are those of one that was never stopped."""
    whole = wrong(0, 30)
    one = [(event["event"], event["rule"]) for event in looked(AlertTracker(), whole)]
    parts = wrong(0, 30)
    first = looked(AlertTracker(), parts[:kept])
    history = tmp_path / "history.jsonl"
    history.write_bytes(b"".join(msgspec.json.encode(line) + b"\n" for line in parts[:kept]))
    alarm = AlertTracker()
    alarm.start(history)
    second = looked(alarm, parts[kept:])
    assert [(event["event"], event["rule"]) for event in [*first, *second]] == one
    assert [line["alerts"] for line in parts] == [line["alerts"] for line in whole]


def test_a_notice_is_not_given_again_after_a_restart(tmp_path: Path) -> None:
    lines = with_same(run(30, kind="bypass"), 1.0)
    looked(AlertTracker(), lines[:10])
    history = tmp_path / "history.jsonl"
    history.write_bytes(b"".join(msgspec.json.encode(line) + b"\n" for line in lines[:10]))
    alarm = AlertTracker()
    alarm.start(history)
    assert looked(alarm, lines[10:]) == []


def test_a_run_that_begins_has_no_history(tmp_path: Path) -> None:
    alarm = AlertTracker()
    alarm.start(tmp_path / "history.jsonl")
    assert looked(alarm, run(3)) == []
    assert level("fallback") == 0


def test_a_history_that_cannot_be_read_is_said_and_passed_over(tmp_path: Path) -> None:
    (tmp_path / "history.jsonl").write_bytes(b'{"version": \n')
    alarm = AlertTracker()
    with capture_logs() as said:
        alarm.start(tmp_path / "history.jsonl")
    assert [event["event"] for event in said] == ["alerts begin anew: the history cannot be read"]
    assert looked(alarm, run(3)) == []
