"""Seconds of setup and run over several starts."""

from pathlib import Path

import pytest

from palimpsest.services.live.stopwatch import Stopwatch
from palimpsest.services.report.folder import Seconds, read_seconds


def test_seconds_of_several_starts_are_summed(tmp_path: Path):
    path = tmp_path / "seconds.json"
    first = Stopwatch(path, now=100.0)
    first.update(now=150.0, ready=130.0)
    first.save()
    second = Stopwatch(path, now=1000.0)
    second.update(now=1025.0, ready=1020.0)
    second.save()
    assert read_seconds(path) == Seconds(setup=50.0, run=25.0)


def test_only_the_first_ready_time_counts(tmp_path: Path):
    watch = Stopwatch(tmp_path / "seconds.json", now=0.0)
    watch.update(now=12.0, ready=10.0)
    watch.update(now=40.0, ready=30.0)  # after a restart
    assert watch.seconds() == Seconds(setup=10.0, run=30.0)


def test_a_run_stopped_during_setup_has_no_run_time(tmp_path: Path):
    watch = Stopwatch(tmp_path / "seconds.json", now=5.0)
    watch.update(now=25.0, ready=None)
    assert watch.seconds() == Seconds(setup=20.0, run=0.0)


def test_seconds_are_written_every_few_seconds(tmp_path: Path):
    watch = Stopwatch(tmp_path / "seconds.json", now=0.0)
    watch.update(now=4.0, ready=None)
    watch.keep()
    assert read_seconds(tmp_path / "seconds.json") is None
    watch.update(now=6.0, ready=None)
    watch.keep()
    assert read_seconds(tmp_path / "seconds.json") == Seconds(setup=pytest.approx(6.0), run=0.0)
