"""examples/embedded.toml on the real engine, as `make run` starts it, shortened or complete."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from palimpsest.common.evaluation.estimates import parse_results
from palimpsest.common.evaluation.lines import evaluation_lines
from palimpsest.rescore import Models, rescore
from tests.processes.waiting import LIMIT_S
from tests.runs.run_process import RunProcess, check_ledger, check_whole_groups, history

pytestmark = pytest.mark.vllm
EMBEDDED = "examples/embedded.toml"
AS_IN_THE_EXAMPLE = 8
"""Samples in a group."""
SHORT, COMPLETE = 200, 500
"""Versions. The short run ends soon after the policy uses the tool; the complete one is the example."""
EVERY = 25
"""The test recomputes the old log-probs of every 25th version."""


@dataclass(frozen=True)
class Run:
    """A finished run of `versions` versions."""

    home: Path
    versions: int

    @property
    def summary(self) -> dict[str, Any]:
        """Contents of summary.json."""
        found: dict[str, Any] = json.loads((self.home / "summary.json").read_text())
        return found


@pytest.fixture(scope="module", params=[SHORT, pytest.param(COMPLETE, marks=pytest.mark.long)])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, starting_model: Path) -> Run:
    """A run with every batch recorded and every version kept."""
    folder = tmp_path_factory.mktemp("runs")
    shorter = [f"--learner.versions={request.param}"] if request.param != COMPLETE else []
    process = RunProcess(
        EMBEDDED,
        f"--run.folder={folder}",
        "--run.id=main",
        f"--model.path={starting_model}",
        "--learner.record=true",
        "--learner.checkpoint.keep=1000",
        "--evaluation.every=100",
        "--evaluation.tasks=24",
        *shorter,
    )
    code, output = process.finish(within_s=4 * LIMIT_S)
    assert code == 0, output[-4000:]
    print(output[-1500:])
    return Run(folder / "main", request.param)


def test_the_policy_learns_to_use_the_tool(run: Run) -> None:
    """Staleness, and with it the speed of learning, depends on the machine: 200 versions end between 0.3 and 1, and
    500 between 0.8 and 1. A policy that does not learn stays at a success of 0.03 and a reward of 0.07.
    """
    seen = run.summary
    assert seen["success_first"] <= 0.35
    assert seen["success_last"] >= (0.6 if run.versions == COMPLETE else seen["success_first"] + 0.1)
    assert seen["reward_last"] >= seen["reward_first"] + 0.2


def test_training_is_asynchronous(run: Run) -> None:
    """Staleness depends on the machine, but occurs everywhere and never exceeds the bound."""
    assert 1 <= run.summary["max_staleness_seen"] <= 3
    assert run.summary["multi_version_trajectories"] > 0


def test_every_trajectory_is_accounted_for(run: Run) -> None:
    ledger = check_ledger(run.home, samples=AS_IN_THE_EXAMPLE, max_staleness=3)
    counts = run.summary["trajectories"]
    assert (
        counts["offered"]
        == counts["trained"] + sum(counts["dropped"].values()) + counts["dead_lettered"] + counts["pending"]
    )
    assert counts["trained"] == ledger["trained"]
    check_whole_groups(ledger, groups=run.versions * 16, samples=AS_IN_THE_EXAMPLE)


def test_old_log_probs_equal_plain_transformers(run: Run, starting_model: Path) -> None:
    """Independent code rescores each token of every 25th version under the stored weights that sampled it."""
    seen = rescore(run.home / "records", Models(run.home / "snapshots", str(starting_model), "eager"), every=EVERY)
    lines = history(run.home)[::EVERY]
    assert seen["tokens"] == sum(line["tokens"] for line in lines)
    assert seen["versions"] >= len(lines), "versions so far apart share no sampled version"
    assert seen["same_layout_unequal"] == 0
    assert seen["alone_max_abs"] <= 2e-3
    exact, recomputed = seen["exact_discrepancy"], seen["current_recompute_discrepancy"]
    aged = [s for s in exact if int(s) >= 2]
    assert max(exact.values()) < 0.01, "discrepancy is engine noise at every staleness"
    for staleness in aged:
        assert recomputed[staleness] > 5 * exact[staleness], "the error of current weights grows with staleness"


def test_held_out_tasks_are_evaluated_with_one_version_each(run: Run) -> None:
    """The workers continue with later versions in between, and no trajectory of an evaluation is trained on."""
    lines = evaluation_lines(run.home)
    assert [line["trained_versions"] for line in lines] == list(range(0, run.versions + 1, 100))
    assert all(line["trajectories"]["scored"] == line["trajectories"]["offered"] == 96 for line in lines)
    first, last = (parse_results(line["evaluation"])["lookup"].avg for line in (lines[0], lines[-1]))
    assert first is not None
    assert last is not None
    assert first.high < last.low if run.versions == COMPLETE else first.value < last.value, "it learns these tasks"
    assert run.summary["best_version"] == lines[-1]["best"]
    best = max(line["overall"] for line in lines)
    assert next(line["version"] for line in lines if line["overall"] == best) == lines[-1]["best"]
    pins = json.loads((run.home / "snapshots" / "pins.json").read_bytes())
    assert pins == {str(lines[-1]["best"]): {"best": None}}


def test_the_summary_and_the_report_are_complete(run: Run) -> None:
    seen = run.summary
    for key in (
        "versions", "tokens_trained", "trajectories", "success_first", "success_last", "log_discrepancy",
        "log_staleness_ratio", "max_staleness_seen", "multi_version_trajectories", "engine", "seconds",
        "tokens_per_second",
    ):  # fmt: skip
        assert seen[key] is not None, key
    assert seen["versions"] == run.versions
    assert seen["exact"] is True
    assert seen["refused_versions"] == 0
    assert seen["stored"]["versions"] == run.versions  # without the last, with version 0
    assert 0.0 < seen["stored"]["share"] < 1.0
    assert (run.home / "report.html").stat().st_size > 100_000
