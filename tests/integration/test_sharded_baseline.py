"""VCPO's minimum-variance baseline of sharded ranks is that of one rank (learner.vcpo.baseline with sharding)."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.learner_parts import families
from tests.processes.baseline_on_ranks import BAD, CASES, FAILING, LOCAL, MINIBATCHES, SHARED
from tests.processes.waiting import LIMIT_S
from tests.runs.run_process import ROOT

pytestmark = pytest.mark.servers
SAME_ROWS = [case for case in CASES if case not in (SHARED, LOCAL)]
"""Cases in which each pass has the layout of one rank."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Case -> results of each rank."""
    folder: Path = tmp_path_factory.mktemp("baseline")
    model = families.build("Qwen3", folder / "model")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m")
    done = subprocess.run(
        [sys.executable, *launcher, "tests.processes.baseline_on_ranks", str(model), str(folder)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=LIMIT_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    return {case: [torch.load(folder / f"{case} {rank}.pt", weights_only=False) for rank in range(2)] for case in CASES}


@pytest.mark.parametrize("case", SAME_ROWS)
def test_gradients_and_baselines_are_those_of_one_rank(saved: Any, case: str) -> None:
    for rank in saved[case]:
        own, expected = rank["sharded"], rank["alone"]
        assert own["baseline"] == pytest.approx(expected["baseline"], rel=1e-9)
        assert own["norms"] == pytest.approx(expected["norms"], rel=1e-5)
        assert own["factor"] == pytest.approx(expected["factor"], rel=1e-9)
        for first, second in zip(own["gradients"][0], expected["gradients"][0], strict=True):
            assert torch.allclose(first, second, rtol=1e-5, atol=1e-7)
        for first, second in zip(own["masters"], expected["masters"], strict=True):
            assert torch.allclose(first, second, rtol=1e-5, atol=1e-6)
        assert own["advantages"] == pytest.approx(expected["advantages"], abs=1e-6)
        assert min(expected["norms"]) > 0


@pytest.mark.parametrize("case", SAME_ROWS)
def test_all_ranks_have_the_same_result(saved: Any, case: str) -> None:
    first, second = (rank["sharded"] for rank in saved[case])
    assert first["baseline"] == second["baseline"]
    assert first["rejected"] == second["rejected"] == ({"bad": "ValueError: a block"} if case == FAILING else {})
    everything = {row.trajectory for minibatch in MINIBATCHES for row in minibatch}
    assert set(first["advantages"]) == everything
    assert all(map(torch.equal, first["masters"], second["masters"]))


def test_a_row_that_fails_changes_the_baseline_of_its_group(saved: Any) -> None:
    with_row, without = (saved[case][0]["sharded"]["advantages"] for case in ("full", FAILING))
    for row in MINIBATCHES[0]:
        if row.group == "a":
            assert with_row[row.trajectory] == without[row.trajectory]
    assert with_row["v2"] != without["v2"]
    assert BAD.trajectory in without


def test_ranks_that_share_rows_have_the_baseline_of_whole_rows(saved: Any) -> None:
    for rank in saved[SHARED]:
        own, expected = rank["sharded"], rank["alone"]
        assert own["baseline"] == pytest.approx(expected["baseline"], rel=2e-2)
        for first, second in zip(own["gradients"][0], expected["gradients"][0], strict=True):
            assert float((first - second).norm()) <= 0.05 * float(second.norm()) + 1e-6


def test_the_norm_of_a_ranks_own_shards_gives_another_baseline(saved: Any) -> None:
    for rank in saved[LOCAL]:
        assert rank["sharded"]["baseline"] != pytest.approx(rank["alone"]["baseline"], rel=1e-6)
