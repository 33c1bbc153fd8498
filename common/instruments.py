"""Prometheus metrics of every service: build, process, heartbeat, free space, distance to the end of the log."""

import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from prometheus_client import Gauge, ProcessCollector

from palimpsest import __version__
from palimpsest.common.bus.port import Consumer
from palimpsest.common.metrics import REGISTRY

PROCESS = ProcessCollector(registry=REGISTRY)
BUILD = Gauge(
    "palimpsest_build_info", "1; the release and the service of this process", ["version", "service"], registry=REGISTRY
)
HEARTBEAT = Gauge(
    "palimpsest_heartbeat_seconds",
    "Seconds since the last turn of a loop of this process: learner (between batches), rollout, replica",
    ["loop"],
    registry=REGISTRY,
)
FREE_BYTES = Gauge(
    "palimpsest_free_bytes",
    "Bytes free on the file system of a folder: run, checkpoints, store",
    ["folder"],
    registry=REGISTRY,
)
LOG_LAG = Gauge(
    "palimpsest_log_lag_records",
    "Records of a topic that this process must read and has not read yet",
    ["topic"],
    registry=REGISTRY,
)


class AgeGauge:
    """Sets a gauge to the seconds since the last `restart`. The gauge also grows while the caller hangs."""

    def __init__(self, gauge: Gauge, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._gauge, self._clock = gauge, clock
        self._at: float | None = None

    def restart(self) -> None:
        """Start at 0 again."""
        first, self._at = self._at is None, self._clock()
        if first:
            self._gauge.set_function(self._age)

    def _age(self) -> float:
        return math.nan if self._at is None else self._clock() - self._at


def report_build(service: str) -> None:
    """Set the series of the release."""
    BUILD.labels(__version__, service).set(1)


def report_free_bytes(folder: str, path: Path) -> None:
    """Report the free space of a folder at each scrape; NaN while it cannot be read. folder: its name in the series."""

    def free() -> float:
        try:
            return shutil.disk_usage(path).free
        except OSError:
            return math.nan

    FREE_BYTES.labels(folder).set_function(free)


def report_lag(topic: str, consumer: Consumer) -> None:
    """Report what the consumer has not read yet. Call it in the thread that polls the consumer."""
    LOG_LAG.labels(topic).set(consumer.lag())
