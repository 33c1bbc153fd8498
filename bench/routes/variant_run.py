"""The processes of one variant: store, learner, and sometimes a replica. The calling process runs the workers."""

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

from bench.routes.instrumented_learner import END, GO, TENSOR_BYTES, learn
from bench.routes.simulated_workers import SimulatedWorkers
from bench.routes.variants import REFERENCE, Load, Place, Variant, run_config
from palimpsest.common.bus.factory import connect
from palimpsest.common.config.schema import RunConfig
from palimpsest.common.config.to_toml import to_toml
from palimpsest.common.parent_death import die_with_parent
from palimpsest.common.proc_stat import stat_fields
from tools.backends.ports import free

LIMIT_S = 600.0
"""Limit of each wait. Only an error reaches it."""
POLL_S = 0.003
ROLLOUT = 2.0
"""Default time in which the workers sample a batch, in steps of the reference. Sampling takes longer than training, so
the learner waits for each batch."""
PRELOADED = ["torch", "transformers", "transformers.models.qwen3.modeling_qwen3", "bench.routes.instrumented_learner"]
REPLICA = {
    "tokens": "palimpsest_replica_scored_tokens_total",
    "loads": "palimpsest_replica_loads_total",
    "load_s": "palimpsest_replica_load_seconds_sum",
    "pass_s": "palimpsest_replica_pass_seconds_sum",
}
IDLE = "palimpsest_replica_waiting_trajectories"

FORKS = get_context("forkserver")
"""The fork server loads torch once for all learners."""


class Pace:
    """The pace of the workers, from the newest steps of the reference."""

    def __init__(self, initial_step_s: float) -> None:
        self._steps: deque[float] = deque([initial_step_s], maxlen=3)

    def trained(self, name: str, version: dict[str, Any]) -> None:
        """Add the measurements of a version that this variant trained."""
        if name == REFERENCE:
            self._steps.append(version["seconds"]["passes"] + version["seconds"]["step"])

    def batch_s(self, variant: Variant) -> float:
        """Return the seconds in which the workers of this variant sample a batch."""
        return median(self._steps) * (ROLLOUT if variant.rollout is None else variant.rollout)


class VariantRun:
    """The run of one variant. It starts in two steps, `begin` and `ready`, so that all runs can start in parallel."""

    def __init__(self, variant: Variant, load: Load, *, folder: Path, model: Path, vocabulary: int) -> None:
        self.variant, self._load, self._vocabulary = variant, load, vocabulary
        store_port = free()
        place = Place(folder, model, store_port, free(store_port))
        self.config: RunConfig = run_config(variant, load, place)
        self._file = folder / f"{variant.name}.toml"
        self._file.write_text(to_toml(self.config))
        self._processes: list[subprocess.Popen[bytes]] = []
        self._replica: int | None = None
        self._pipe, self._learner_pipe = FORKS.Pipe()
        self._learner = FORKS.Process(target=learn, args=(self.config, self._learner_pipe), daemon=True)
        self._workers: SimulatedWorkers

    def begin(self) -> None:
        """Start the store, and the learner when the store is ready."""
        self._start("palimpsest.services.snapshot_store")
        self._wait_until_ready(self.config.snapshot_store.port)
        self._learner.start()
        self._learner_pipe.close()  # the pipe then ends with the learner

    def ready(self) -> None:
        """Wait until the learner has published version 0. Then start the replica and the workers."""
        assert self._receive() == {}
        if self.variant.proximal["kind"] == "replica":
            self._replica = self._start("palimpsest.services.learner.replica").pid
            self._wait_until_ready(self.config.replica.port)
        bus = connect(self.config)
        self._workers = SimulatedWorkers(
            bus, run=self.config.run.id, load=self._load, vocabulary=self._vocabulary, seed=1
        )

    def turn(self, batch_s: float) -> dict[str, Any]:
        """Train one version. Returns the measurements of the learner and of this process."""
        before, held, flushed = self._replica_figures(), len(self._workers.holds), self._workers.flushed
        self._workers.resume_clock()
        self._pipe.send(GO)
        version = self._receive(lambda: self._workers.drive(batch_s))
        self._workers.drive(batch_s)  # reads the announcement of the version
        self._drain()
        after = self._replica_figures()
        complete = max(self._workers.finished_at.pop(trajectory) for trajectory in version.pop("batch"))
        began, taken = version.pop("began_at"), version.pop("taken_at")
        return version | {
            "batch_s": batch_s,
            "wait_s": taken - began,
            "pickup_s": taken - max(complete, began),
            "hold_s": sum(self._workers.holds[held:]),
            "flushed": self._workers.flushed - flushed,
            "replica": {name: after[name] - before[name] for name in after},
        }

    def tensor_bytes(self) -> dict[str, int]:
        """Return the tensor bytes of the learner (instrumented_learner.tensor_bytes). Call it between turns."""
        self._pipe.send(TENSOR_BYTES)
        return self._receive()

    def end(self) -> None:
        """End the learner, then all other processes."""
        if self._learner.is_alive():
            self._pipe.send(END)
            self._learner.join(LIMIT_S)
        self._workers.close()
        self.kill()

    def kill(self) -> None:
        """Kill all processes."""
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

    def _wait_until_ready(self, port: int) -> None:
        """Wait until the newest process is ready at this port."""
        process, deadline = self._processes[-1], time.monotonic() + LIMIT_S
        while time.monotonic() < deadline:
            assert process.poll() is None, f"{self.variant.name}: a process ended with {process.returncode}"
            try:
                if httpx.get(f"http://127.0.0.1:{port}/readyz", timeout=LIMIT_S).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        raise AssertionError(f"{self.variant.name}: port {port} does not answer")

    def _receive(self, meanwhile: Callable[[], None] = lambda: None) -> dict[str, Any]:
        """Return the next message of the learner. Calls `meanwhile` repeatedly until it arrives."""
        deadline = time.monotonic() + LIMIT_S
        while not self._pipe.poll(POLL_S):
            assert time.monotonic() < deadline, f"{self.variant.name}: no version in {LIMIT_S:.0f} s"
            meanwhile()
        try:
            message: dict[str, Any] = self._pipe.recv()
        except EOFError:
            raise AssertionError(f"{self.variant.name}: the learner ended; its error is above") from None
        return message

    def _drain(self) -> None:
        """Wait until the replica is idle, so that it does not work during the turns of other variants."""
        while self._replica is not None and self._metrics().get(IDLE):
            time.sleep(0.02)

    def _replica_figures(self) -> dict[str, float]:
        """Return the sums since the start of the replica, or {} without one."""
        if self._replica is None:
            return {}
        samples = self._metrics()
        return {name: samples.get(series, 0.0) for name, series in REPLICA.items()} | {"cpu_s": cpu_s(self._replica)}

    def _metrics(self) -> dict[str, float]:
        text = httpx.get(f"http://127.0.0.1:{self.config.replica.port}/metrics", timeout=LIMIT_S).text
        return {
            sample.name: sample.value for family in text_string_to_metric_families(text) for sample in family.samples
        }


def cpu_s(pid: int) -> float:
    """Return the CPU seconds that this process has used so far."""
    fields = stat_fields(Path(f"/proc/{pid}/stat").read_text())
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
