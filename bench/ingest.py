"""Many simulated rollout streams into the ingest of one learner: its rate, its lag and its memory.

python -m bench ingest [--streams 1000] [--tokens 2048] [--seconds 30] [--pace 0.5] [--bus sqlite|kafka]

Other processes run the streams (bench/simulated_streams.py): trajectories end out of order, some records are published
twice, some trajectories are dropped. This process is the learner without its model. It builds the ingest like
services/learner/coordinator.py, takes and resolves batches like services/learner/loop.py, and reads the offsets as for
a checkpoint. Rates and CPU time are those of this process, from the first batch on. The admission of the ledger bounds
the trajectories in flight, so the memory must stay constant.
"""

import argparse
import contextlib
import multiprocessing
import os
import tempfile
import time
from array import array
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from multiprocessing.context import SpawnProcess
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

import numpy as np

from bench.meter import Meter, Metered
from bench.records import TURNS
from bench.runs import run
from bench.simulated_streams import Streams, drive
from palimpsest.common import logs
from palimpsest.common.bus.factory import open_bus
from palimpsest.common.config.schema import RunConfig
from palimpsest.common.messages import Sampling
from palimpsest.common.snapshots.control_check import ControlCheck
from palimpsest.common.versions import Version
from palimpsest.services.learner.buffer.ledger import TrajectoryLedger
from palimpsest.services.learner.ingest.build import build_ingest
from palimpsest.services.learner.ingest.offers import TaskSettings
from palimpsest.services.learner.ingest.trajectory_reader import NoEvaluations, ReceivedTrajectory
from tools.backends.kafka import Kafka

MAX_STALENESS = 3
TIME_LIMIT_S = 600.0
POLL_S = 0.1
"""Wait for records, as in the loop of the learner."""
POINTS = 50
"""Number of samples of memory and lag during a run."""
LIMIT_S = 60.0
"""Limit for the first batch and for the end of the streams. Only an error reaches it."""


class OnlyLearner:
    """See Authority in common/snapshots/control_check.py: no other learner takes the run over."""

    def newest_writer(self) -> int:
        """Return the epoch of this learner."""
        return 1

    def newest_version(self) -> Version:
        """Return a version that no run reaches."""
        return Version(1 << 30)


def main(arguments: list[str]) -> dict[str, Any]:
    """Return the figures of one run."""
    options = _options(arguments)
    logs.configure("bench", "warning", "text")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="palimpsest-bench-")))
        bus: dict[str, Any] = {"kind": options.bus}
        if options.bus == "kafka":
            bus["servers"] = options.servers or stack.enter_context(Kafka(folder / "kafka")).servers
            bus["topic_prefix"] = f"bench.{folder.name}."
        config = run(folder, bus)
        learner = stack.enter_context(closing(Learner(config, options.streams)))
        published = stack.enter_context(_running_streams(config, options))
        figures = learner.ingest(options.seconds, published)
    _show(figures)
    return {"name": "ingest", "bus": options.bus, "streams": options.streams, "tokens": options.tokens, **figures}


def _options(arguments: list[str]) -> argparse.Namespace:
    options = argparse.ArgumentParser(
        prog="python -m bench ingest", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--streams", type=int, default=1000)
    options.add_argument("--tokens", type=int, default=2048, help="mean length of a trajectory")
    options.add_argument("--seconds", type=float, default=30.0, help="measured seconds, from the first batch on")
    options.add_argument("--pace", type=float, default=0.5, help="median seconds of a trajectory")
    options.add_argument("--duplicates", type=float, default=0.02, help="share of records published again")
    options.add_argument("--dropped", type=float, default=0.01, help="share of dropped trajectories")
    options.add_argument("--processes", type=int, default=2, help="processes that run the streams")
    options.add_argument("--bus", choices=["sqlite", "kafka"], default="sqlite")
    options.add_argument("--servers", default="", help="address of a running Kafka")
    return options.parse_args(arguments)


@dataclass(frozen=True, slots=True)
class Mark:
    """Totals at a moment."""

    at: float = field(default_factory=time.monotonic)
    cpu_s: float = field(default_factory=time.process_time)
    trained: int = 0
    tokens: int = 0
    bytes: int = 0


@dataclass
class Curve:
    """Lag and memory during a run."""

    lag: list[tuple[float, int]] = field(default_factory=list)
    """Seconds, and unread records on the log."""
    rss_mb: list[tuple[float, float]] = field(default_factory=list)
    """Seconds, and resident memory in MB."""

    def sample(self, seconds: float, behind: int) -> None:
        """Add a point."""
        self.lag.append((round(seconds, 2), max(0, behind)))
        self.rss_mb.append((round(seconds, 2), round(_rss_bytes() / 1e6, 2)))

    def slope_mb_per_min(self) -> float:
        """Return the slope of a line fitted to the memory of the second half of the run."""
        half = np.array(self.rss_mb[len(self.rss_mb) // 2 :])
        return float(np.polyfit(half[:, 0], half[:, 1], 1)[0]) * 60


class Learner:
    """A learner without a model: it resolves each batch without training."""

    def __init__(self, config: RunConfig, streams: int) -> None:
        self.config, self._meter = config, Meter()
        self._bus = Metered(open_bus(config), self._meter)
        samples = config.tasks.samples_per_group
        # admit twice as many trajectories as there are streams, so that no stream is idle while a batch is incomplete
        ledger: TrajectoryLedger[ReceivedTrajectory] = TrajectoryLedger(
            samples=samples,
            groups_per_batch=max(1, 2 * streams // ((MAX_STALENESS + 1) * samples)),
            max_staleness=MAX_STALENESS,
            time_limit_s=TIME_LIMIT_S,
        )
        settings = TaskSettings(
            seed=config.run.seed,
            environments=config.tasks.environments,
            samples=samples,
            sampling=Sampling(temperature=1.0, max_turn_tokens=512, max_trajectory_tokens=1 << 20, max_turns=TURNS),
            time_limit_s=TIME_LIMIT_S,
        )
        self._ingest = build_ingest(
            self._bus,
            ledger,
            settings,
            run=config.run.id,
            vocabulary=1 << 20,
            confirm=lambda: None,  # no other learner takes this run over
            epoch=lambda: 1,
            evaluations=NoEvaluations(),
            control=ControlCheck(OnlyLearner()),
        )
        self._ledger, self._reader = ledger, self._ingest.reader
        self._version, self._trained, self._tokens = Version(0), 0, 0

    def ingest(self, seconds: float, published: "Synchronized[int]") -> dict[str, Any]:
        """Read, take and resolve batches for `seconds` after the first batch. Returns the figures."""
        curve, began, first = Curve(), time.monotonic(), None
        self._ingest.start({}, {}, {}, now=began)
        # until the end of the second batch at least, because rates need one batch
        while first is None or time.monotonic() < first.at + seconds or self._trained == first.trained:
            assert first or time.monotonic() < began + LIMIT_S, f"no batch after {LIMIT_S} s"
            self._next()
            if first is None and self._version:
                first, self._meter.ages = self._mark(), array("f")
            if first and time.monotonic() >= first.at + len(curve.lag) * seconds / POINTS:
                curve.sample(time.monotonic() - first.at, published.value - self._meter.records)
        return self._figures(first, self._mark(), curve)

    def close(self) -> None:
        self._ingest.close()
        self._bus.close()

    def _next(self) -> None:
        """Do one round of the loop. Resolves all complete batches."""
        self._reader.read_all(self._version, timeout_s=POLL_S)
        self._drop_unusable()
        self._ingest.tasks.offer(self._version, now=time.monotonic())
        while batch := self._ledger.take_batch(self._version):
            for trajectory in [trajectory for group in batch for trajectory in group.stale]:
                self._reader.resolve(trajectory)
            for trajectory in [trajectory for group in batch for trajectory in group.items]:
                self._reader.resolve(trajectory)
                self._trained += 1
                self._tokens += len(trajectory.record.tokens) // 4
            self._version = Version(self._version + 1)
            self._reader.offsets()  # as the version's checkpoint does

    def _drop_unusable(self) -> None:
        now = time.monotonic()
        self._ledger.expire(now=now)
        for trajectory in [*self._ledger.drop_stale(self._version), *self._ledger.drop_small()]:
            self._reader.resolve(trajectory)

    def _mark(self) -> Mark:
        return Mark(trained=self._trained, tokens=self._tokens, bytes=self._meter.bytes)

    def _figures(self, first: Mark, last: Mark, curve: Curve) -> dict[str, Any]:
        seconds, trained, cpu_s = last.at - first.at, last.trained - first.trained, last.cpu_s - first.cpu_s
        ages = np.array(self._meter.ages) * 1000
        counts = self._ledger.counts()
        assert counts["dead_lettered"] == 0, counts
        return {
            "seconds": round(seconds, 2),
            "trajectories_per_s": round(trained / seconds, 1),
            "tokens_per_s": round((last.tokens - first.tokens) / seconds),
            "megabytes_per_s": round((last.bytes - first.bytes) / seconds / 1e6, 2),
            "cpu_s_per_trajectory": round(cpu_s / trained, 7),
            "busy_share": round(cpu_s / seconds, 3),
            "trajectories_per_cpu_s": round(trained / cpu_s, 1),
            "megabytes_per_cpu_s": round((last.bytes - first.bytes) / cpu_s / 1e6, 2),
            "age_ms_p50": round(float(np.percentile(ages, 50)), 1),
            "age_ms_p95": round(float(np.percentile(ages, 95)), 1),
            "lag_records_max": max(behind for _, behind in curve.lag),
            "rss_slope_mb_per_min": round(curve.slope_mb_per_min(), 2),
            "versions": self._version,
            "records_read": self._meter.records,
            "trajectories": counts,
            "lag": curve.lag,
            "rss_mb": curve.rss_mb,
        }


@contextlib.contextmanager
def _running_streams(config: RunConfig, options: argparse.Namespace) -> Iterator["Synchronized[int]"]:
    """Run the processes of the streams. Yields the shared number of records that they have published."""
    spawn = multiprocessing.get_context("spawn")
    published, stop = spawn.Value("Q"), spawn.Event()
    processes: list[SpawnProcess] = []
    for i in range(options.processes):
        share = len(range(i, options.streams, options.processes))
        streams = Streams(config, i, options.processes, share, options.tokens, options.pace, options.duplicates,
                          options.dropped)  # fmt: skip
        processes.append(spawn.Process(target=drive, args=(streams, published, stop), daemon=True))
        processes[-1].start()
    try:
        yield published
    finally:
        stop.set()
        for process in processes:
            process.join(LIMIT_S)
    assert [process.exitcode for process in processes] == [0] * len(processes), "a driver of streams crashed"


def _rss_bytes() -> int:
    """Return the resident memory of this process, bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _show(figures: dict[str, Any]) -> None:
    for key, value in figures.items():
        if not isinstance(value, list):
            print(f"  {key:22} {value}")
    print("  seconds  behind  RSS MB")
    for (seconds, behind), (_, rss) in list(zip(figures["lag"], figures["rss_mb"], strict=True))[::5]:
        print(f"  {seconds:7.1f} {behind:7} {rss:7.1f}", flush=True)
