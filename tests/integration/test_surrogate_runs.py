"""Every surrogate in a complete learner (loop, store, log and checkpoints) in one process.

The trajectories come from a script, so their staleness is known.
"""

from pathlib import Path
from typing import Any

import pytest

from palimpsest.common.config import load
from palimpsest.common.config.to_toml import to_toml
from palimpsest.common.files import write
from palimpsest.common.service import Server, Stop
from palimpsest.services.learner.__main__ import body
from palimpsest.services.snapshot_store.app import create_app
from palimpsest.services.snapshot_store.storage_disk import DiskStorage
from tests.runs.run_process import check_ledger, history, scripted
from tests.runs.scripted_worker import HALF, ScriptedWorker

pytestmark = pytest.mark.servers
VERSIONS = 5
GROUPS = 2
SAMPLES = 4
SURROGATES = (
    "bypass", "current_recompute", "interp_prox_loglinear", "linear_prox", "ewma_prox", "ppo_ewma_async",
)  # fmt: skip


@pytest.fixture(scope="module", params=SURROGATES)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, starting_model: Path) -> Path:
    """Folder of a finished run with this surrogate."""
    kind: str = request.param
    folder = tmp_path_factory.mktemp("surrogates")
    app = create_app(DiskStorage(folder / kind / "snapshots"), sweep_s=3600)
    with Server(app, "127.0.0.1", 0, key="snapshot_store") as store:
        flags = (
            f"--run.id={kind}",
            f"--learner.proximal.kind={kind}",
            f"--learner.groups_per_batch={GROUPS}",
            f"--snapshot_store.port={store.port}",
            "--learner.port=0",
            "--learner.audit.fraction=1.0",
            "--learner.checkpoint.keep=1000",
        )
        toml = scripted(folder, starting_model, versions=VERSIONS)
        invocation = load([str(toml), *flags], {}, program="")
        write(invocation.config.run.home / "run.toml", to_toml(invocation.config).encode())
        with ScriptedWorker(invocation.config):
            body(invocation, Stop())
    return invocation.config.run.home


def test_every_trajectory_is_accounted_for(run: Path) -> None:
    ledger = check_ledger(run, samples=SAMPLES)
    assert ledger["trained"] == VERSIONS * GROUPS * SAMPLES
    assert (ledger["dropped"], ledger["dead_lettered"]) == ({}, 0)


def test_the_history_never_marks_a_surrogate_as_exact(run: Path) -> None:
    lines = history(run)
    assert len(lines) == VERSIONS
    for line in lines:
        assert (line["exact"], line["proximal"]) == (False, run.name)


def test_the_history_has_the_staleness_of_the_script(run: Path) -> None:
    """The other tests are valid for stale tokens and trajectories of several versions only if this holds."""
    for version, line in enumerate(history(run)):
        tokens = {int(staleness): part["tokens"] for staleness, part in line["by_staleness"].items()}
        expected = {version - max(0, version - 3): HALF * 8}
        young = version - max(0, version - 1)
        expected[young] = expected.get(young, 0) + HALF * 8
        assert tokens == expected


def test_bypass_has_no_discrepancy_and_current_recompute_no_staleness_ratio(run: Path) -> None:
    for line in history(run):
        seen: dict[str, Any] = line["all"]
        if run.name == "bypass":
            assert seen["log_discrepancy_abs"] == 0.0
        if run.name == "current_recompute":  # one optimizer step per version: the proximal equals the current policy
            assert seen["log_staleness_ratio_abs"] < 1e-4
            assert seen["clipped"] == 0.0
