"""A learner of two ranks computes the same as one rank, and a run with two ranks finishes."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.processes.train_on_ranks import CASES, FAILING
from tests.processes.waiting import LIMIT_S
from tests.runs.endless import ENDLESS, end_after_two_versions, kill_a_learner
from tests.runs.run_process import (
    ROOT,
    RunProcess,
    check_ledger,
    check_whole_groups,
    history,
    newest_manifest,
    scripted,
    wait_for,
)

pytestmark = pytest.mark.servers


def launched(model: Path, folder: Path, *, ranks: int) -> dict[str, list[dict[str, Any]]]:
    """Case -> results of each rank of tests/processes/train_on_ranks.py."""
    folder.mkdir()
    launcher = (
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={ranks}",
        "-m",
        "tests.processes.train_on_ranks",
    )
    done = subprocess.run(
        [sys.executable, *launcher, str(model), str(folder)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=LIMIT_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    return {case: [torch.load(folder / f"{case} {rank}.pt") for rank in range(ranks)] for case in CASES | FAILING}


@pytest.fixture(scope="module")
def alone(starting_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    return launched(starting_model, tmp_path_factory.mktemp("ranks") / "one", ranks=1)


@pytest.fixture(scope="module")
def together(starting_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    return launched(starting_model, tmp_path_factory.mktemp("ranks") / "two", ranks=2)


@pytest.mark.parametrize("case", CASES | FAILING)
def test_two_ranks_compute_the_same_as_one_rank(alone: Any, together: Any, case: str) -> None:
    (whole,), parts = alone[case], together[case]
    assert whole["steps"] == 3  # one before, and one per minibatch
    assert whole["masked"] > 0
    assert whole["rejected"] == (["failing"] if case in FAILING else [])
    for part in parts:
        for own, expected in zip(part["gradients"], whole["gradients"], strict=True):
            assert float(expected.abs().max()) > 1e-3
            # Sums of float32 terms up to 1.4 in another order: their rounding is a few 1e-7.
            assert torch.allclose(own, expected, rtol=1e-4, atol=1e-6)
        for own, expected in zip(part["masters"], whole["masters"], strict=True):
            assert torch.allclose(own, expected, rtol=1e-5, atol=1e-6)
        assert part["loss"] == pytest.approx(whole["loss"], rel=1e-5, abs=1e-7)
        assert part["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-5)
        assert (part["scored"], part["rejected"]) == (whole["scored"], whole["rejected"])
        assert (part["steps"], part["masked"]) == (whole["steps"], whole["masked"])


@pytest.mark.parametrize("case", CASES | FAILING)
def test_both_ranks_have_the_same_state_bit_for_bit(together: Any, case: str) -> None:
    first, second = together[case]
    assert first["state"].keys() == second["state"].keys()
    for name, tensor in first["state"].items():
        assert torch.equal(tensor, second["state"][name]), name
    assert first["steps"] == second["steps"]


@pytest.mark.parametrize("case", CASES)
def test_exactly_one_rank_computes_each_row(together: Any, case: str) -> None:
    first, second = (part["mine"] for part in together[case])
    rows = [row.trajectory for minibatch in CASES[case] for row in minibatch]
    assert sorted(first + second) == sorted(rows)
    assert len(first) - len(second) in (1, 2)  # rows alternate between ranks in each minibatch
    assert (second == []) == (case == "a rank without any rows")


@pytest.mark.parametrize("case", CASES)
def test_distributed_scores_equal_those_of_one_rank_bit_for_bit(alone: Any, together: Any, case: str) -> None:
    (whole,), (first, second) = alone[case], together[case]
    assert len(whole["values"]) == whole["passes"] >= 2
    for own, expected in zip(first["values"], whole["values"], strict=True):
        assert torch.equal(own, expected)
    # the first call has one micro-batch, the second all others
    shared = whole["passes"] - 1
    assert (first["passes"], second["passes"]) == (1 + (shared + 1) // 2, shared // 2)


def test_a_run_with_two_ranks_continues_after_the_death_of_a_rank(tmp_path: Path, starting_model: Path) -> None:
    toml, home = scripted(tmp_path, starting_model, versions=1), tmp_path / "scripted"
    run = RunProcess(toml, ENDLESS, "--local.learner_ranks=2", "--learner.minibatches=2")
    try:
        wait_for(lambda: len(history(home)) >= 2, run, name="version 2")
        kill_a_learner(run, ranks=2)
        versions = end_after_two_versions(run, home)
        code, output = run.finish()
    finally:
        run.kill_everything()
    assert code == 0, output[-3000:]
    ledger = check_ledger(home)
    check_whole_groups(ledger, groups=versions * 4, samples=4)
    assert ledger["dead_lettered"] == 0
    assert newest_manifest(home)["optimizer_steps"] == 2 * versions
    lines = history(home)
    assert len(lines) == versions
    assert sum(len(line["successes"]) for line in lines) == ledger["trained"]
    assert all(line["exact"] and line["skipped"] == 0 for line in lines)
