"""The register of unreachable services."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from prometheus_client import generate_latest

from palimpsest.common.metrics import REGISTRY
from palimpsest.common.outages import KAFKA, STORE, Outages


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def gauge(of: str) -> float:
    series = f'palimpsest_outage{{of="{of}"}} '
    (line,) = [line for line in generate_latest(REGISTRY).decode().splitlines() if line.startswith(series)]
    return float(line.removeprefix(series))


def test_an_outage_begins_with_the_first_call_and_ends_with_the_last() -> None:
    clock = Clock()
    outages = Outages(clock=clock)
    one, other = outages.waiting(), outages.waiting()
    clock.now = 1001.0
    one.record_failure(STORE, "http://s:1", "ConnectError", until=1120.0)
    clock.now = 1005.0
    other.record_failure(STORE, "http://s:1", "ReadTimeout", until=1060.0)
    (found,) = outages.ongoing()
    assert found == {
        "of": STORE, "address": "http://s:1", "since": 1000.0, "until": 1060.0, "problem": "ReadTimeout"
    }  # fmt: skip
    other.record_answer()
    (found,) = outages.ongoing()
    assert (found["since"], found["until"]) == (1000.0, 1120.0)
    one.record_answer()
    assert outages.ongoing() == []


def test_an_abandoned_call_leaves_the_outage() -> None:
    outages = Outages()

    def abandoned_call() -> None:
        with outages.waiting() as call:
            call.record_failure(KAFKA, "k:1", "refused")
            raise ValueError("failed")

    with pytest.raises(ValueError, match="failed"):
        abandoned_call()
    assert outages.ongoing() == []


def test_a_call_that_fails_for_another_service_waits_for_that_one_only() -> None:
    outages = Outages()
    with outages.waiting() as call:
        call.record_failure(STORE, "http://s:1", "ConnectError")
        call.record_failure("S3", "http://s3:1", "503")
        assert [found["of"] for found in outages.ongoing()] == ["S3"]


def test_the_next_failure_after_an_answer_is_another_outage() -> None:
    clock = Clock()
    outages = Outages(clock=clock)
    call = outages.waiting()
    call.record_failure(KAFKA, "k:1", "refused")
    clock.now = 1050.0
    call.record_answer()
    clock.now = 1060.0
    call.record_failure(KAFKA, "k:1", "refused")
    assert [found["since"] for found in outages.ongoing()] == [1050.0]  # since the last answer


def test_the_gauge_is_1_during_an_outage_and_0_after_it() -> None:
    outages = Outages()
    with outages.waiting() as one, outages.waiting() as other:
        one.record_failure(KAFKA, "k:1", "refused")
        other.record_failure(KAFKA, "k:2", "refused")
        one.record_answer()
        assert gauge(KAFKA) == 1
    assert gauge(KAFKA) == 0


def test_no_outage_remains_after_many_threads_enter_and_leave() -> None:
    outages = Outages()

    def calls(number: int) -> None:
        for i in range(200):
            with outages.waiting() as call:
                call.record_failure(KAFKA if (number + i) % 2 else STORE, "a", "x", until=float(i))
                outages.ongoing()

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(calls, range(8)))
    assert outages.ongoing() == []
