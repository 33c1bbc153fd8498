"""The main job on the real engine over a real Kafka and a real MinIO: examples/cluster.toml, shortened.

Its batches are small and its tool is slow, so that every machine has trajectories in flight while versions change.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.config import load
from tests.cluster import Cluster, cluster
from tests.runs import ROOT, RunProcess, check_whole_groups

pytestmark = [pytest.mark.vllm, pytest.mark.servers]
VERSIONS = 20
GROUPS = 2


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("cluster")) as both:
        yield both


@pytest.fixture(scope="module")
def home(servers: Cluster, tmp_path_factory: pytest.TempPathFactory, starting_model: Path) -> Path:
    """A run with every version kept and every batch recorded."""
    folder = tmp_path_factory.mktemp("runs")
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
        '--env_gateway.plugins={slow_lookup = "tests.slow_lookup:SlowLookup"}',
        "--tasks.environments={slow_lookup = 1.0}",
        environment=servers.environment,
    )
    code, output = run.finish(within_s=1200)
    assert code == 0, output[-4000:]
    print(output[-1500:])
    return folder / "cluster"


def test_it_is_two_workers_and_two_ranks_over_kafka_and_minio(home: Path) -> None:
    config = load([str(home / "run.toml")], {}, program="").config
    assert (config.local.rollout_workers, config.local.learner_ranks) == (2, 2)
    assert (config.bus.kind, config.snapshot_store.storage) == ("kafka", "s3")
    assert not (home / "bus.sqlite").exists()
    assert not (home / "snapshots").exists()


def test_the_ledger_balances(servers: Cluster, home: Path) -> None:
    said = servers.audit(home)
    assert said["sound"], said["findings"]
    check_whole_groups(said["trajectories"], groups=VERSIONS * GROUPS, samples=8)
    assert set(said["trajectories"]["dropped"]) <= {"over_staleness"}  # overtaken while their tool was at work
    assert said["dead_letters"] == {}


def test_it_is_really_asynchronous_and_exact(home: Path) -> None:
    seen = json.loads((home / "summary.json").read_text())
    assert seen["versions"] == VERSIONS
    assert 2 <= seen["max_staleness_seen"] <= 3
    assert seen["multi_version_trajectories"] > 0
    assert seen["exact"] is True
    assert seen["refused_versions"] == 0


def test_old_log_probs_are_those_of_plain_transformers(servers: Cluster, home: Path) -> None:
    """With the versions as they stand in the bucket."""
    done = subprocess.run(
        [sys.executable, "-m", "tools.rescore", str(home), "--every", "2"],
        cwd=ROOT,
        env={**os.environ, **servers.environment},
        capture_output=True,
        text=True,
        check=True,
    )
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["tokens"] > 300  # six or so for each trajectory
    assert seen["same_layout_unequal"] == 0
    assert seen["alone_max_abs"] <= 2e-3
    assert max(seen["exact_discrepancy"].values()) < 0.01
