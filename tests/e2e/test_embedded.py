"""The main job on the real engine: examples/embedded.toml as `make run` starts it, and the same with things broken."""

import json
from pathlib import Path

import psutil
import pytest

from tests.runs import RunProcess, check_ledger, check_whole_groups, history, wait_for
from tools.rescore import Models, rescore

pytestmark = pytest.mark.vllm
EMBEDDED = "examples/embedded.toml"
AS_IN_THE_EXAMPLE = 8
"""Samples in a group."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, starting_model: Path) -> Path:
    """A whole run, recorded, with every version kept: about four minutes."""
    folder = tmp_path_factory.mktemp("runs")
    run = RunProcess(
        EMBEDDED,
        f"--run.folder={folder}",
        "--run.id=main",
        f"--model.path={starting_model}",
        "--learner.record=true",
        "--learner.checkpoint.keep=1000",
    )
    code, output = run.finish(within_s=1500)
    assert code == 0, output[-4000:]
    print(output[-1500:])
    return folder / "main"


def summary(home: Path) -> dict:
    return json.loads((home / "summary.json").read_text())


def test_it_learns_to_use_the_tool(home: Path) -> None:
    seen = summary(home)
    assert seen["success_first"] <= 0.35
    assert seen["success_last"] >= 0.8


def test_it_is_really_asynchronous(home: Path) -> None:
    seen = summary(home)
    assert 2 <= seen["max_staleness_seen"] <= 3
    assert seen["multi_version_trajectories"] > 0


def test_every_trajectory_is_accounted_for(home: Path) -> None:
    ledger = check_ledger(home, samples=AS_IN_THE_EXAMPLE, max_staleness=3)
    counts = summary(home)["trajectories"]
    assert (
        counts["offered"]
        == counts["trained"] + sum(counts["dropped"].values()) + counts["dead_lettered"] + counts["pending"]
    )
    assert counts["trained"] == ledger["trained"]
    check_whole_groups(ledger, groups=500 * 16, samples=AS_IN_THE_EXAMPLE)
    assert ledger["dropped"].get("over_staleness", 0) < 0.01 * ledger["trained"]


def test_old_log_probs_are_those_of_plain_transformers(home: Path, starting_model: Path) -> None:
    """Every twenty-fifth version: each token under the stored weights that sampled it, by code that shares nothing."""
    seen = rescore(home / "records", Models(home / "snapshots", str(starting_model), "eager"), every=25)
    assert seen["tokens"] > 10_000
    assert seen["versions"] > 20
    assert seen["same_layout_unequal"] == 0
    assert seen["alone_max_abs"] <= 2e-3
    exact, recomputed = seen["exact_discrepancy"], seen["current_recompute_discrepancy"]
    aged = [s for s in exact if int(s) >= 2]
    assert max(exact.values()) < 0.01, "discrepancy is engine noise at every staleness"
    for staleness in aged:
        assert recomputed[staleness] > 5 * exact[staleness], "current weights in the old ones' place show a trend"


def test_the_summary_and_the_report_are_there(home: Path) -> None:
    seen = summary(home)
    for key in (
        "versions", "tokens_trained", "trajectories", "success_first", "success_last", "log_discrepancy",
        "log_staleness_ratio", "max_staleness_seen", "multi_version_trajectories", "engine", "seconds",
        "tokens_per_second",
    ):  # fmt: skip
        assert seen[key] is not None, key
    assert seen["versions"] == 500
    assert seen["exact"] is True
    assert seen["refused_versions"] == 0
    assert (home / "report.html").stat().st_size > 100_000


def test_an_engine_whose_update_is_broken_serves_nothing(tmp_path: Path, starting_model: Path) -> None:
    """The tied head left at the old weights, as the CPU build does by itself: only the canary notices."""
    run = RunProcess(
        EMBEDDED,
        f"--run.folder={tmp_path}",
        "--run.id=broken",
        f"--model.path={starting_model}",
        "--learner.versions=40",
        environment={"PALIMPSEST_FAULT": "rollout.skip_head"},
    )
    code, output = run.finish(within_s=400)
    assert code == 5, output[-4000:]
    assert "worker-0: version" in output
    assert "is refused: on the canaries the engine" in output
    assert summary(tmp_path / "broken")["refused_versions"] == 1


def test_a_killed_worker_leaves_no_engine_behind_and_is_replaced(tmp_path: Path, starting_model: Path) -> None:
    run = RunProcess(
        EMBEDDED,
        f"--run.folder={tmp_path}",
        "--run.id=killed",
        f"--model.path={starting_model}",
        "--learner.versions=14",
    )
    home = tmp_path / "killed"
    try:
        wait_for(lambda: len(history(home)) >= 3, run, within_s=300, name="the third version")
        (worker,) = run.services()["rollout"]
        engines = worker.children(recursive=True)
        assert engines
        run.kill("rollout")
        code, output = run.finish(within_s=400)
    finally:
        run.kill_everything()
    assert code == 0, output[-4000:]
    assert not any(engine.is_running() and engine.status() != psutil.STATUS_ZOMBIE for engine in engines)
    check_ledger(home, samples=AS_IN_THE_EXAMPLE, max_staleness=3)
    assert len(history(home)) == 14
