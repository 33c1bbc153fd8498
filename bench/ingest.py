"""Many simulated rollout streams into one learner's assembly: how much it takes in, how far behind, in what memory.

python -m bench ingest [--streams 1000] [--tokens 2048] [--seconds 30] [--pace 0.5] [--bus sqlite|kafka]

Processes beside this one drive the streams (bench/simulated_streams.py): out of order, some records twice, some
trajectories given up. This process is the learner without its model: the ingest that
services/learner/coordinator.py builds, batches taken and resolved as services/learner/loop.py does, their offsets
asked for as for a checkpoint. Rates and CPU time are those of this process, from the first batch on; the
admission of the ledger bounds what is in flight, so its memory has to be flat.
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
from palimpsest.common.versions import Version
from palimpsest.services.learner.buffer.ledger import TrajectoryLedger
from palimpsest.services.learner.ingest.build import build_ingest
from palimpsest.services.learner.ingest.offers import TaskSettings
from palimpsest.services.learner.ingest.trajectory_reader import ReceivedTrajectory
from tools.backends.kafka import Kafka

MAX_STALENESS = 3
TIME_LIMIT_S = 600.0
POLL_S = 0.1
"""As the learner's loop waits."""
POINTS = 50
"""Samples of memory and lag over a run."""
MOST_WAIT_S = 60.0
"""The first batch is complete by then, or something is broken."""


def main(arguments: list[str]) -> dict[str, Any]:
    """The figures of one run."""
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
        published = stack.enter_context(_driven(config, options))
        figures = learner.take_in(options.seconds, published)
    _show(figures)
    return {"name": "ingest", "bus": options.bus, "streams": options.streams, "tokens": options.tokens, **figures}


def _options(arguments: list[str]) -> argparse.Namespace:
    options = argparse.ArgumentParser(
        prog="python -m bench ingest", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--streams", type=int, default=1000)
    options.add_argument("--tokens", type=int, default=2048, help="mean length of a trajectory")
    options.add_argument("--seconds", type=float, default=30.0, help="measured, from the first batch on")
    options.add_argument("--pace", type=float, default=0.5, help="usual seconds a stream takes for a trajectory")
    options.add_argument("--duplicates", type=float, default=0.02, help="share of records published again")
    options.add_argument("--dropped", type=float, default=0.01, help="share of trajectories given up")
    options.add_argument("--processes", type=int, default=2, help="that drive the streams")
    options.add_argument("--bus", choices=["sqlite", "kafka"], default="sqlite")
    options.add_argument("--servers", default="", help="a Kafka that runs already")
    return options.parse_args(arguments)


@dataclass(frozen=True, slots=True)
class Mark:
    """What has been done by a moment."""

    at: float = field(default_factory=time.monotonic)
    cpu_s: float = field(default_factory=time.process_time)
    trained: int = 0
    tokens: int = 0
    bytes: int = 0


@dataclass
class Curve:
    """What is seen over a run."""

    lag: list[tuple[float, int]] = field(default_factory=list)
    """Seconds, records on the log that were not read yet."""
    rss_mb: list[tuple[float, float]] = field(default_factory=list)
    """Seconds, MB."""

    def sample(self, seconds: float, behind: int) -> None:
        """One point."""
        self.lag.append((round(seconds, 2), max(0, behind)))
        self.rss_mb.append((round(seconds, 2), round(_rss_bytes() / 1e6, 2)))

    def slope_mb_per_min(self) -> float:
        """Of the memory's straight line through the second half."""
        half = np.array(self.rss_mb[len(self.rss_mb) // 2 :])
        return float(np.polyfit(half[:, 0], half[:, 1], 1)[0]) * 60


class Learner:
    """A learner without a model: what it would train on is resolved at once."""

    def __init__(self, config: RunConfig, streams: int) -> None:
        self.config, self._meter = config, Meter()
        self._bus = Metered(open_bus(config), self._meter)
        samples = config.tasks.samples_per_group
        # twice as many trajectories are admitted as there are streams: none is idle while a batch is being completed
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
        )
        self._ledger, self._reader = ledger, self._ingest.reader
        self._version, self._trained, self._tokens = Version(0), 0, 0

    def take_in(self, seconds: float, published: "Synchronized[int]") -> dict[str, Any]:
        """Read, take batches and resolve them for so long after the first one; the figures."""
        curve, began, first = Curve(), time.monotonic(), None
        self._ingest.start({}, {}, {}, now=began)
        # to the end of the second batch at least, so that there is something to divide by
        while first is None or time.monotonic() < first.at + seconds or self._trained == first.trained:
            assert first or time.monotonic() < began + MOST_WAIT_S, f"no batch after {MOST_WAIT_S} s"
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
        """One round of the loop, with a batch if one is complete."""
        self._reader.read_all(self._version, timeout_s=POLL_S)
        self._drop_unusable()
        self._ingest.tasks.offer(self._version, now=time.monotonic())
        while batch := self._ledger.take_batch(self._version):
            for arrived in [arrived for group in batch for arrived in group.stale]:
                self._reader.resolve(arrived)
            for arrived in [arrived for group in batch for arrived in group.items]:
                self._reader.resolve(arrived)
                self._trained += 1
                self._tokens += len(arrived.record.tokens) // 4
            self._version = Version(self._version + 1)
            self._reader.offsets()  # as the version's checkpoint does

    def _drop_unusable(self) -> None:
        now = time.monotonic()
        self._ledger.expire(now=now)
        for arrived in [*self._ledger.drop_stale(self._version), *self._ledger.drop_small()]:
            self._reader.resolve(arrived)

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
def _driven(config: RunConfig, options: argparse.Namespace) -> Iterator["Synchronized[int]"]:
    """Processes that drive the streams; yields the number of records they have published, which goes on."""
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
            process.join(MOST_WAIT_S)
    assert [process.exitcode for process in processes] == [0] * len(processes), "a driver of streams crashed"


def _rss_bytes() -> int:
    """Memory of this process that is in RAM."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _show(figures: dict[str, Any]) -> None:
    for key, value in figures.items():
        if not isinstance(value, list):
            print(f"  {key:22} {value}")
    print("  seconds  behind  RSS MB")
    for (seconds, behind), (_, rss) in list(zip(figures["lag"], figures["rss_mb"], strict=True))[::5]:
        print(f"  {seconds:7.1f} {behind:7} {rss:7.1f}", flush=True)
