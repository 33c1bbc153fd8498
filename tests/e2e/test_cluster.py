"""examples/cluster.toml, shortened: a training run on the real engine over a real Kafka and a real MinIO.

Batches are small and the tool waits for versions, so that on every machine trajectories span several of them. The test
kills one of the two workers, and later the engine of the other.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from palimpsest.common.config import load
from tests.processes.waiting import LIMIT_S
from tests.runs import held_lookup
from tests.runs.run_process import ROOT, RunProcess, check_whole_groups, history, wait_for
from tests.servers.cluster import Cluster
from tools.backends.kafka import Kafka
from tools.backends.minio import Minio

pytestmark = [pytest.mark.vllm, pytest.mark.servers]
VERSIONS = 20
GROUPS = 2
KILLED_AT, ENGINE_KILLED_AT = 5, 9
"""Versions trained when the test kills the worker and the engine."""


@dataclass(frozen=True)
class Finished:
    """A finished run, and the processes that the killed worker had started."""

    home: Path
    orphans: list[psutil.Process]
    output: str


@pytest.fixture(scope="module")
def servers(kafka_server: Kafka, minio_server: Minio) -> Cluster:
    return Cluster(kafka_server, minio_server)


@pytest.fixture(scope="module")
def finished(servers: Cluster, tmp_path_factory: pytest.TempPathFactory, starting_model: Path) -> Finished:
    """The finished run, with every version kept and every batch recorded."""
    folder = tmp_path_factory.mktemp("runs")
    home = folder / "cluster"
    run = RunProcess(
        "examples/cluster.toml",
        *servers.flags,
        f"--run.folder={folder}",
        "--run.id=cluster",
        f"--model.path={starting_model}",
        f"--learner.versions={VERSIONS}",
        "--learner.record=true",
        "--learner.checkpoint.keep=1000",
        f"--learner.groups_per_batch={GROUPS}",
        *held_lookup.FLAGS,
        environment={**servers.environment, held_lookup.VARIABLE: str(home)},
    )
    try:
        wait_for(lambda: len(history(home)) >= KILLED_AT, run, name=f"version {KILLED_AT}")
        orphans = killed(run, "worker-1")
        wait_for(lambda: len(history(home)) >= ENGINE_KILLED_AT, run, name=f"version {ENGINE_KILLED_AT}")
        kill_engine(run, "worker-0")
        code, output = run.finish(within_s=2 * LIMIT_S)
    finally:
        run.kill_everything()
    assert code == 0, output[-4000:]
    print(output[-1500:])
    return Finished(home, orphans, output)


def killed(run: RunProcess, name: str) -> list[psutil.Process]:
    """SIGKILL this worker once it has an engine. Returns the processes that it had started."""
    worker, engine = worker_with_engine(run, name)
    started = worker.children(recursive=True)
    assert engine in started
    worker.kill()
    return started


def kill_engine(run: RunProcess, name: str) -> None:
    """SIGKILL the engine of this worker once it has one."""
    worker_with_engine(run, name)[1].kill()


def worker_with_engine(run: RunProcess, name: str) -> tuple[psutil.Process, psutil.Process]:
    """Wait for the worker's process and its engine's process, and return both."""
    found: list[tuple[psutil.Process, psutil.Process]] = []

    def has_an_engine() -> bool:
        try:
            for worker in run.services().get("rollout", []):
                if f"--rollout.worker={name}" in worker.cmdline():
                    children = worker.children(recursive=True)
                    found.extend((worker, child) for child in children if "EngineCore" in "".join(child.cmdline()))
        except psutil.Error:  # a process ended meanwhile
            return False
        return bool(found)

    wait_for(has_an_engine, run, name=f"an engine of {name}")
    return found[-1]


@pytest.fixture(scope="module")
def home(finished: Finished) -> Path:
    return finished.home


def test_the_run_has_two_workers_and_two_ranks_over_kafka_and_minio(home: Path) -> None:
    config = load([str(home / "run.toml")], {}, program="").config
    assert (config.local.rollout_workers, config.local.learner_ranks) == (2, 2)
    assert (config.bus.kind, config.snapshot_store.storage) == ("kafka", "s3")
    assert not (home / "bus.sqlite").exists()
    assert not (home / "snapshots").exists()


def test_a_killed_worker_leaves_no_engine_behind(finished: Finished) -> None:
    assert finished.orphans
    assert not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in finished.orphans)


def test_a_killed_engine_is_reported_and_drops_no_trajectory(finished: Finished, servers: Cluster) -> None:
    assert "worker-0 crashed" in finished.output
    assert "the inference engine died of SIGKILL" in finished.output
    assert "engine_failed" not in servers.audit(finished.home)["trajectories"]["dropped"]


def test_the_ledger_balances(servers: Cluster, home: Path) -> None:
    audit = servers.audit(home)
    assert audit["sound"], audit["findings"]
    check_whole_groups(audit["trajectories"], groups=VERSIONS * GROUPS, samples=8)
    assert audit["dead_letters"] == {}


def test_training_is_asynchronous_and_exact(home: Path) -> None:
    seen = json.loads((home / "summary.json").read_text())
    assert seen["versions"] == VERSIONS
    assert 1 <= seen["max_staleness_seen"] <= 3
    assert seen["multi_version_trajectories"] > 0
    assert seen["exact"] is True
    assert seen["refused_versions"] == 0


def test_old_log_probs_equal_plain_transformers(servers: Cluster, home: Path) -> None:
    """The rescoring reads the versions from the bucket."""
    done = subprocess.run(
        [sys.executable, "-m", "palimpsest", "rescore", str(home), "--every", "2"],
        cwd=ROOT,
        env={**os.environ, **servers.environment},
        capture_output=True,
        text=True,
        check=True,
    )
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["tokens"] == sum(line["tokens"] for line in history(home)[::2])
    assert seen["same_layout_unequal"] == 0
    assert seen["alone_max_abs"] <= 2e-3
    assert max(seen["exact_discrepancy"].values()) < 0.01
