"""Series of every service."""

import math
from pathlib import Path

from prometheus_client import CollectorRegistry, Gauge, generate_latest

from palimpsest import __version__
from palimpsest.common.instruments import AgeGauge, report_build, report_free_bytes
from palimpsest.common.metrics import REGISTRY


def test_an_age_grows_at_each_scrape_until_it_restarts() -> None:
    registry, now = CollectorRegistry(), 100.0
    age = AgeGauge(Gauge("age", "", registry=registry), clock=lambda: now)
    assert registry.get_sample_value("age") == 0.0
    age.restart()
    now = 107.5
    assert registry.get_sample_value("age") == 7.5
    age.restart()
    now = 109.0
    assert registry.get_sample_value("age") == 1.5


def test_a_folder_that_cannot_be_read_has_an_unknown_free_space(tmp_path: Path) -> None:
    report_free_bytes("checkpoints", tmp_path / "later")
    series = "palimpsest_free_bytes", {"folder": "checkpoints"}
    assert math.isnan(REGISTRY.get_sample_value(*series) or 0.0)
    (tmp_path / "later").mkdir()
    assert (REGISTRY.get_sample_value(*series) or 0.0) > 0


def test_a_process_reports_its_release_its_memory_and_its_start() -> None:
    report_build("rollout")
    page = generate_latest(REGISTRY).decode()
    assert f'palimpsest_build_info{{service="rollout",version="{__version__}"}} 1.0' in page
    for name in ("process_resident_memory_bytes", "process_start_time_seconds", "process_open_fds"):
        assert (REGISTRY.get_sample_value(name) or 0.0) > 0
