"""Outages in the live view: merging the services' reports, their text, and their end."""

import io
import math
import time

import pytest
from rich.console import Console

from palimpsest.services.live.history_tail import accumulate
from palimpsest.services.live.outages import (
    EndedOutage,
    Outage,
    OutageHistory,
    clock,
    ended_text,
    full_text,
    merge,
    who_waits,
)
from palimpsest.services.live.poller import RunObservation, ServiceObservation
from palimpsest.services.live.state import Plan, State, state
from palimpsest.services.live.view import line, view
from palimpsest.services.local.exit_reasons import Crash
from tests.records.history_lines import a_line, learner, servers, worker

PLAN = Plan("night-run", versions=20)
WALL = 1_790_000_000.0
"""Unix seconds when the run's clock shows 0."""
KAFKA = Outage("Kafka", "k:9092", WALL + 50.0, WALL + 650.0, "refused", ("learner", "worker-0"))


def reported(
    of: str = "Kafka", address: str = "k:9092", since: float = 5.0, until: float | None = None
) -> dict[str, object]:
    return {"of": of, "address": address, "since": since, "until": until, "problem": "refused"}


@pytest.mark.parametrize(
    ("services", "expected"),
    [
        ({}, ()),
        ({"learner": []}, ()),
        ({"learner": [reported()]}, (Outage("Kafka", "k:9092", 5.0, None, "refused", ("learner",)),)),
        (
            {"learner": [reported(since=7.0, until=90.0)], "worker-0": [reported(since=6.0, until=80.0)]},
            (Outage("Kafka", "k:9092", 6.0, 80.0, "refused", ("learner", "worker-0")),),
        ),
        (
            {"learner": [reported(since=7.0, until=90.0)], "worker-0": [reported(since=9.0)]},
            (Outage("Kafka", "k:9092", 7.0, 90.0, "refused", ("learner", "worker-0")),),
        ),
        (
            {"worker-0": [reported(of="env_gateway", address="g", since=8.0), reported(since=3.0)]},
            (
                Outage("Kafka", "k:9092", 3.0, None, "refused", ("worker-0",)),
                Outage("env_gateway", "g", 8.0, None, "refused", ("worker-0",)),
            ),
        ),
    ],
)
def test_reports_of_the_services_are_merged(
    services: dict[str, list[dict[str, object]]], expected: tuple[Outage, ...]
) -> None:
    assert merge(services) == expected


def test_an_observed_outage_adds_no_waiting_service() -> None:
    assert merge({"learner": [reported(since=7.0)]}, [Outage("Kafka", "k:9092", 4.0)]) == (
        Outage("Kafka", "k:9092", 4.0, None, "refused", ("learner",)),
    )


def test_a_lasting_outage_is_shown_and_ends_once() -> None:
    course, outage = OutageHistory(), Outage("Kafka", "k", 10.0)
    counts: list[tuple[int, int]] = []
    for now, outages in [(11, [outage]), (14, [outage]), (16, [outage]), (18, []), (20, []), (30, []), (40, [])]:
        course.update(float(now), outages)
        counts.append((len(course.current), len(course.past)))
    assert counts == [(0, 0), (1, 0), (1, 0), (1, 0), (0, 1), (0, 1), (0, 1)]
    assert course.past == (EndedOutage("Kafka", "k", 10.0, 16.0),)


def test_a_short_outage_is_not_shown() -> None:
    course = OutageHistory()
    for now, outages in [(11.0, [Outage("Kafka", "k", 10.0)]), (12.0, []), (20.0, []), (30.0, [])]:
        course.update(now, outages)
        assert (course.current, course.past) == ((), ())


def test_a_short_gap_in_the_reports_does_not_end_an_outage() -> None:
    course = OutageHistory()
    for now, outages in [(15.0, [Outage("Kafka", "k", 10.0)]), (17.0, []), (17.5, [Outage("Kafka", "k", 17.0)])]:
        course.update(now, outages)
    assert [outage.since for outage in course.current] == [10.0]
    assert course.past == ()


def test_the_text_names_server_duration_waiting_services_and_remedy() -> None:
    assert full_text(KAFKA, WALL + 145.0) == (
        f"no answer from Kafka at k:9092 since {clock(WALL + 50.0)} (1 min 35 s) (refused); learner and worker-0 wait "
        f"for it until {clock(WALL + 650.0)} (bus.outage_limit_s); then the run ends with code 3, and --resume "
        f"continues it. Start the broker; the run then continues by itself"
    )
    assert ended_text(EndedOutage("Kafka", "k:9092", WALL, WALL + 100.0)) == (
        f"Kafka at k:9092 answers again after 1 min 40 s (from {clock(WALL)} to {clock(WALL + 100.0)})"
    )
    assert clock(WALL) == time.strftime("%H:%M:%S", time.localtime(WALL))


@pytest.mark.parametrize(
    ("waiting", "words"),
    [
        (("learner",), "learner waits for it until {}; then the run restarts learner"),
        (
            ("learner", "worker-0"),
            "learner and worker-0 wait for it until {}; then the run restarts learner and worker-0",
        ),
    ],
)
def test_an_outage_of_the_store_names_the_services_that_restart(waiting: tuple[str, ...], words: str) -> None:
    outage = Outage("snapshot_store", "http://s", WALL, WALL + 120.0, waiting=waiting)
    assert who_waits(outage) == words.format(clock(WALL + 120.0))


def state_with(
    *outages: Outage,
    past: tuple[EndedOutage, ...] = (),
    lines: int = 5,
    arrived: float = math.inf,
    now: float = 145.0,
    crashes: tuple[Crash, ...] = (),
    **services: ServiceObservation,
) -> State:
    running = servers(now) | {"learner": learner(now), "worker-0": worker(now, seconds=now)} | services
    trained = accumulate((a_line(i) for i in range(lines)), arrived=arrived)
    sight = RunObservation(running, trained, outages=outages, past=past, clock=WALL)
    return state(PLAN, sight, now=now, started=1.0, crashes=crashes)


def text(shown: State, width: int, height: int) -> list[str]:
    console = Console(width=width, height=height, file=io.StringIO(), force_terminal=True, color_system=None)
    console.print(view(shown, width=width, height=height))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_during_an_outage_there_is_no_estimate() -> None:
    shown = state_with(KAFKA, arrived=45.0)
    assert (shown.left_s, shown.still_s) == (None, 100.0)
    status_line = line(shown)
    assert "left" not in status_line
    assert "no progress for 1 min 40 s; no answer from Kafka at k:9092 since" in status_line
    whole = "\n".join(text(shown, 100, 40))
    assert "about" not in whole
    assert "no progress for 1 min 40 s" in whole
    assert "waits for an answer from Kafka" in whole


def test_a_narrow_terminal_shows_the_outage_first() -> None:
    rows = text(state_with(KAFKA, arrived=45.0), 60, 12)
    assert len(rows) <= 12
    assert max(map(len, rows)) <= 60
    assert "no answer from Kafka" in rows[0]
    assert rows[1].startswith("no answer from Kafka at k:9092 since")
    whole = " ".join(row.strip() for row in rows)
    assert "learner and worker-0 wait for it until" in whole
    assert "Start the broker" in whole
    assert "no progress for 1 min 40 s" in whole


@pytest.mark.parametrize("width", [40, 60, 140])
def test_outages_fit_into_the_terminal(width: int) -> None:
    outages = [KAFKA, Outage("S3", "http://s3:9000", WALL, None, "", ()), Outage("env_gateway", "http://g", WALL)]
    past = tuple(EndedOutage("Kafka", "k", WALL, WALL + 140.0) for _ in range(3))
    for height in range(1, 40):
        rows = text(state_with(*outages, past=past), width, height)
        assert len(rows) <= height
        assert max(map(len, rows)) <= width


def test_the_end_of_an_outage_is_shown_for_a_while() -> None:
    past = (EndedOutage("Kafka", "k:9092", WALL + 20.0, WALL + 140.0),)
    assert any("Kafka at k:9092 answers again" in row for row in text(state_with(past=past), 80, 24))
    assert not any("answers again" in row for row in text(state_with(past=past, now=500.0), 80, 24))


@pytest.mark.parametrize(
    ("past", "crashes", "arrived", "known"),
    [
        ((), (), 100.0, True),
        ((EndedOutage("Kafka", "k", WALL + 20.0, WALL + 90.0),), (), 100.0, True),
        ((EndedOutage("Kafka", "k", WALL + 20.0, WALL + 110.0),), (), 100.0, False),
        ((), (Crash("worker-0", 90.0, -9, ""),), 100.0, True),
        ((), (Crash("worker-0", 110.0, -9, ""),), 100.0, False),
        ((), (), -math.inf, False),
    ],
)
def test_the_pace_is_measured_again_after_an_outage_or_a_crash(
    past: tuple[EndedOutage, ...], crashes: tuple[Crash, ...], arrived: float, known: bool
) -> None:
    assert (state_with(past=past, crashes=crashes, arrived=arrived).left_s is not None) == known


def test_the_pace_is_measured_again_after_a_worker_starts() -> None:
    late = worker(145.0, seconds=20.0)
    assert state_with(arrived=100.0, **{"worker-1": late}).left_s is None
    assert state_with(arrived=130.0, **{"worker-1": late}).left_s is not None


def test_without_progress_there_is_no_estimate() -> None:
    assert state_with(arrived=100.0, now=150.0).left_s is not None
    shown = state_with(arrived=100.0, now=170.0)
    assert shown.left_s is None
    assert "no progress for 1 min 10 s" in line(shown)


def test_an_outage_of_a_server_is_shown_once() -> None:
    store_service = servers(100.0)["snapshot_store"]
    store = Outage("snapshot_store", "http://s", WALL + 100.0)
    assert (
        state_with(store, snapshot_store=ServiceObservation(store_service.last, trouble="ReadTimeout")).warnings == ()
    )
    assert state_with(snapshot_store=ServiceObservation(store_service.last, trouble="ReadTimeout")).warnings == (
        "snapshot_store has not answered for 45 s",
    )


def test_a_finished_run_shows_no_outage() -> None:
    assert state_with(KAFKA, lines=20).outages == ()
