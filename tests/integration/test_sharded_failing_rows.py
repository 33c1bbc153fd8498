"""Sharded ranks leave out a row on which a pass of one rank fails, and stay in step."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.learner_parts.models import build
from tests.processes.failing_rows_on_ranks import (
    ADAPTED_BLOCK,
    AGAIN,
    ATTENTION,
    BACKWARD,
    BLOCK,
    CASES,
    EMBEDDING,
    GATHERED,
    INFINITE,
    LATER_AGAIN,
    LOSS,
    NORM,
    SHARED_CASES,
)
from tests.processes.waiting import LIMIT_S
from tests.runs.run_process import ROOT

pytestmark = pytest.mark.servers

ERRORS = {EMBEDDING: "IndexError: index out of range in self", INFINITE: "NotFinite: the gradient is not finite"}


def on_ranks(folder: Path, *arguments: str, number: int = 2) -> subprocess.CompletedProcess[str]:
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={number}", "-m")
    return subprocess.run(
        [sys.executable, *launcher, "tests.processes.failing_rows_on_ranks", str(build(tied=True)), str(folder),
         *arguments],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=LIMIT_S, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Case -> results of each rank."""
    folder = tmp_path_factory.mktemp("failing")
    done = on_ranks(folder)
    assert done.returncode == 0, done.stdout[-4000:]
    return {case: [torch.load(folder / f"{case} {rank}.pt", weights_only=False) for rank in range(2)] for case in CASES}


@pytest.fixture(
    scope="module",
    params=[
        (2, (ATTENTION, LATER_AGAIN)),
        pytest.param((2, SHARED_CASES), marks=pytest.mark.long),
        pytest.param((4, SHARED_CASES), marks=pytest.mark.long),
    ],
    ids=["two ranks, two cases", "two ranks", "four ranks"],
)
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Case -> results of each rank, where two ranks share each row. The row fails on the second one of its group."""
    folder, (number, cases) = tmp_path_factory.mktemp("shared"), request.param
    done = on_ranks(folder, "shared", *cases, number=number)
    assert done.returncode == 0, done.stdout[-4000:]
    return {
        case: [torch.load(folder / f"{case} {rank}.pt", weights_only=False) for rank in range(number)] for case in cases
    }


def test_ranks_that_share_rows_leave_out_the_row(shared: Any) -> None:
    for case, rank in [(case, rank) for case, ranks in shared.items() for rank in ranks]:
        own, expected = rank["failing"], rank["expected"]
        assert own["rejected"] == {"bad": ERRORS.get(case, f"ValueError: {case}")}
        assert expected["rejected"] == {}, case
        assert all(torch.equal(a, b) for a, b in zip(own["masters"], expected["masters"], strict=True)), case
        assert (own["norm"], own["steps"], own["skipped"]) == (expected["norm"], 2, 0), case
        assert own["norm"] > 0, case
        assert own["loss"] == pytest.approx(expected["loss"], rel=1e-6), case


def test_shared_rows_have_the_scores_of_a_run_without_the_row(shared: Any) -> None:
    for case in shared.keys() & {EMBEDDING, BLOCK, NORM, ATTENTION, GATHERED, ADAPTED_BLOCK}:
        own, expected = (shared[case][0][name]["scores"] for name in ("failing", "expected"))
        assert own["bad"].isnan().all(), case
        for row in own.keys() - {"bad"}:
            assert torch.equal(own[row], expected[row]), case


@pytest.mark.parametrize("case", CASES)
def test_the_weights_are_those_of_a_run_without_the_row(both: Any, case: str) -> None:
    """In the expected run the row has the same place, and advantage 0: it has no gradient."""
    for rank in both[case]:
        own, expected = rank["failing"], rank["expected"]
        assert own["rejected"] == {"bad": ERRORS.get(case, f"ValueError: {case}")}
        assert expected["rejected"] == {}
        assert all(torch.equal(a, b) for a, b in zip(own["masters"], expected["masters"], strict=True))
        assert (own["norm"], own["steps"], own["skipped"]) == (expected["norm"], 2, 0)
        assert own["norm"] > 0
        assert own["loss"] == pytest.approx(expected["loss"], rel=1e-6)


def test_a_missing_old_log_prob_counts_once_although_the_passes_are_repeated(both: Any) -> None:
    for rank in both[EMBEDDING]:
        assert rank["failing"]["missed"] == rank["expected"]["missed"] == {"version_gone/drop": 2}


@pytest.mark.parametrize("case", [EMBEDDING, BLOCK, NORM])
def test_scores_of_the_row_are_unknown_and_the_others_are_equal(both: Any, case: str) -> None:
    own, expected = (both[case][0][name]["scores"] for name in ("failing", "expected"))
    assert own["bad"].isnan().all()
    for row in own.keys() - {"bad"}:
        assert torch.equal(own[row], expected[row])


@pytest.mark.parametrize("case", [BACKWARD, AGAIN, LOSS, INFINITE])
def test_scores_are_complete_if_only_the_backward_pass_fails(both: Any, case: str) -> None:
    assert not any(values.isnan().any() for values in both[case][0]["failing"]["scores"].values())


def test_without_the_guard_the_row_ends_the_ranks(tmp_path: Path) -> None:
    done = on_ranks(tmp_path, "unguarded")
    assert done.returncode != 0
    assert "IndexError: index out of range in self" in done.stdout
    assert not list(tmp_path.iterdir())
