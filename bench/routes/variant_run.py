"""One contender's processes: its store, its learner, a replica where it has one; and its workers, driven from here."""

import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from bench.routes.instrumented_learner import END, GO, WEIGH, learn
from bench.routes.simulated_workers import SimulatedWorkers
from bench.routes.variants import REFERENCE, Load, Place, Variant, run_config
from palimpsest.common.bus.factory import connect
from palimpsest.common.config.schema import RunConfig
from palimpsest.common.config.to_toml import to_toml
from palimpsest.common.parent_death import die_with_parent
from palimpsest.common.proc_stat import stat_fields
from tools.backends.ports import free

LIMIT_S = 600.0
"""Nothing here takes so long unless it is broken."""
LOOK_S = 0.003
ROLLOUT = 2.0
"""Seconds in which the workers make a batch, in passes and optimizer steps of the reference: sampling is what takes
longest, and the learner waits a while for each batch."""
PRELOADED = ["torch", "transformers", "transformers.models.qwen3.modeling_qwen3", "bench.routes.instrumented_learner"]
REPLICA = {
    "tokens": "palimpsest_replica_scored_tokens_total",
    "loads": "palimpsest_replica_loads_total",
    "load_s": "palimpsest_replica_load_seconds_sum",
    "pass_s": "palimpsest_replica_pass_seconds_sum",
}
IDLE = "palimpsest_replica_waiting_trajectories"

FORKS = get_context("forkserver")
"""torch is loaded once; each learner is still a process of its own."""


class Pace:
    """How fast workers sample: as the reference trains, lately."""

    def __init__(self, guess_s: float) -> None:
        self._steps: deque[float] = deque([guess_s], maxlen=3)

    def trained(self, name: str, version: dict[str, Any]) -> None:
        """A version was trained by this contender."""
        if name == REFERENCE:
            self._steps.append(version["seconds"]["passes"] + version["seconds"]["step"])

    def batch_s(self, contender: Variant) -> float:
        """Seconds in which its workers are to make a batch."""
        return median(self._steps) * (ROLLOUT if contender.rollout is None else contender.rollout)


class VariantRun:
    """Started in two steps, `begin` and `ready`, so that all can start at once."""

    def __init__(self, contender: Variant, load: Load, *, folder: Path, model: Path, vocabulary: int) -> None:
        self.contender, self._load, self._vocabulary = contender, load, vocabulary
        store_port = free()
        place = Place(folder, model, store_port, free(store_port))
        self.config: RunConfig = run_config(contender, load, place)
        self._file = folder / f"{contender.name}.toml"
        self._file.write_text(to_toml(self.config))
        self._processes: list[subprocess.Popen[bytes]] = []
        self._replica: int | None = None
        self._pipe, self._its_end = FORKS.Pipe()
        self._learner = FORKS.Process(target=learn, args=(self.config, self._its_end), daemon=True)
        self._fleet: SimulatedWorkers

    def begin(self) -> None:
        """Start the store, and the learner when that answers."""
        self._start("palimpsest.services.snapshot_store")
        self._answers(self.config.snapshot_store.port)
        self._learner.start()
        self._its_end.close()  # so that its death is noticed

    def ready(self) -> None:
        """Wait until version 0 stands; start what reads the log."""
        assert self._hear(lambda: None) == {}
        if self.contender.proximal["kind"] == "replica":
            self._replica = self._start("palimpsest.services.learner.replica").pid
            self._answers(self.config.replica.port)
        bus = connect(self.config)
        self._fleet = SimulatedWorkers(
            bus, run=self.config.run.id, load=self._load, vocabulary=self._vocabulary, seed=1
        )

    def turn(self, batch_s: float) -> dict[str, Any]:
        """Train one version; what the learner noted, and what was seen from here."""
        before, held, flushed = self._replica_figures(), len(self._fleet.holds), self._fleet.flushed
        self._fleet.wake()
        self._pipe.send(GO)
        version = self._hear(lambda: self._fleet.drive(batch_s))
        self._fleet.drive(batch_s)  # hears of the version
        self._drain()
        after = self._replica_figures()
        complete = max(self._fleet.finished_at.pop(trajectory) for trajectory in version.pop("batch"))
        began, taken = version.pop("began_at"), version.pop("taken_at")
        return version | {
            "batch_s": batch_s,
            "wait_s": taken - began,
            "pickup_s": taken - max(complete, began),
            "hold_s": sum(self._fleet.holds[held:]),
            "flushed": self._fleet.flushed - flushed,
            "replica": {what: after[what] - before[what] for what in after},
        }

    def weigh(self) -> dict[str, int]:
        """Bytes in the learner; between two turns."""
        self._pipe.send(WEIGH)
        return self._hear(lambda: None)

    def end(self) -> None:
        """End what was started here."""
        if self._learner.is_alive():
            self._pipe.send(END)
            self._learner.join(LIMIT_S)
        self._fleet.close()
        self.kill()

    def kill(self) -> None:
        """At once, whatever it does."""
        for process in self._processes:
            process.kill()
            process.wait()
        if self._learner.pid is not None:
            self._learner.kill()

    def _start(self, module: str) -> subprocess.Popen[bytes]:
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("PALIMPSEST_", "AWS_"))}
        parent = os.getpid()
        process = subprocess.Popen(
            [sys.executable, "-m", module, str(self._file)],
            env=environment,
            preexec_fn=lambda: die_with_parent(parent),
        )
        self._processes.append(process)
        return process

    def _answers(self, port: int) -> None:
        """Wait until the process started last does its work."""
        process, deadline = self._processes[-1], time.monotonic() + LIMIT_S
        while time.monotonic() < deadline:
            assert process.poll() is None, f"{self.contender.name}: a process ended with {process.returncode}"
            try:
                if httpx.get(f"http://127.0.0.1:{port}/readyz", timeout=LIMIT_S).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        raise AssertionError(f"{self.contender.name}: port {port} does not answer")

    def _hear(self, meanwhile: Callable[[], None]) -> dict[str, Any]:
        """What the learner says next."""
        deadline = time.monotonic() + LIMIT_S
        while not self._pipe.poll(LOOK_S):
            assert time.monotonic() < deadline, f"{self.contender.name}: no version in {LIMIT_S:.0f} s"
            meanwhile()
        try:
            said: dict[str, Any] = self._pipe.recv()
        except EOFError:
            raise AssertionError(f"{self.contender.name}: the learner ended; it says why above") from None
        return said

    def _drain(self) -> None:
        """Wait until the replica has nothing left to do: it is not to work in another's turn."""
        while self._replica is not None and self._metrics().get(IDLE):
            time.sleep(0.02)

    def _replica_figures(self) -> dict[str, float]:
        """Sums since it began; {} without one."""
        if self._replica is None:
            return {}
        found = self._metrics()
        return {what: found.get(name, 0.0) for what, name in REPLICA.items()} | {"cpu_s": cpu_s(self._replica)}

    def _metrics(self) -> dict[str, float]:
        text = httpx.get(f"http://127.0.0.1:{self.config.replica.port}/metrics", timeout=LIMIT_S).text
        return {
            sample.name: sample.value for family in text_string_to_metric_families(text) for sample in family.samples
        }


def cpu_s(process: int) -> float:
    """CPU seconds that a process has taken so far, by its number."""
    fields = stat_fields(Path(f"/proc/{process}/stat").read_text())
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
