"""A critic that is split over two ranks computes what a replicated one computes, and continues on one rank."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.learner_parts.models import build
from tests.processes.critic_on_ranks import CASES, FAILING, SINGLE
from tests.processes.waiting import LIMIT_S
from tests.runs.run_process import ROOT

pytestmark = pytest.mark.servers

WRITTEN = (*CASES, "state", "written")


def on_ranks(number: int, folder: Path, what: str) -> "subprocess.CompletedProcess[str]":
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={number}", "-m")
    return subprocess.run(
        [sys.executable, *launcher, "tests.processes.critic_on_ranks", str(build(tied=True)), str(folder), what],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=LIMIT_S, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Case -> results of each of two ranks; "read": of one rank that has read their checkpoint."""
    folder = tmp_path_factory.mktemp("critic")
    for number, what in ((2, "write"), (1, "read")):
        done = on_ranks(number, folder, what)
        assert done.returncode == 0, done.stdout[-4000:]
    found = {
        case: [torch.load(folder / f"{case} {rank}.pt", weights_only=False) for rank in range(2)] for case in WRITTEN
    }
    return found | {"read": [torch.load(folder / "read 0.pt", weights_only=False)]}


@pytest.mark.parametrize("case", CASES)
def test_values_are_equal_bit_for_bit(saved: Any, case: str) -> None:
    for rank in saved[case]:
        for own, expected in zip(rank["sharded"]["values"], rank["replicated"]["values"], strict=True):
            assert torch.equal(own, expected)
            assert float(own.std()) > 1e-3


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("part", ["policy", "critic"])
def test_gradients_and_steps_are_equal_up_to_the_order_of_sums(saved: Any, case: str, part: str) -> None:
    for rank in saved[case]:
        replicated, sharded = rank["replicated"], rank["sharded"]
        assert len(sharded["gradients"][part]) == len(replicated["gradients"][part]) == len(CASES[case])
        both = zip(sharded["gradients"][part][0], replicated["gradients"][part][0], strict=True)
        for own, expected in both:
            if case in SINGLE:
                assert torch.equal(own, expected)
            else:  # bf16 gradients of up to three micro-batches of two ranks, added in float32
                assert torch.allclose(own, expected, rtol=1e-5, atol=1e-6)
        assert any(float(gradient.abs().max()) > 1e-3 for gradient in sharded["gradients"][part][0])
        for own, expected in zip(sharded["masters"][part], replicated["masters"][part], strict=True):
            assert torch.allclose(own, expected, rtol=1e-5, atol=1e-5)
        relative = 1e-5 if case in SINGLE else 1e-2  # a second step begins with weights that differ by rounding
        assert sharded["norms"][part] == pytest.approx(replicated["norms"][part], rel=relative)


@pytest.mark.parametrize("case", CASES)
def test_all_ranks_have_the_same_critic_and_each_holds_half_of_it(saved: Any, case: str) -> None:
    first, second = (rank["sharded"] for rank in saved[case])
    for own, other in zip(first["masters"]["critic"], second["masters"]["critic"], strict=True):
        assert torch.equal(own, other)
    total, head = (sum(4 * master.numel() for master in part) for part in (
        first["masters"]["critic"], first["masters"]["critic"][-2:]
    ))  # fmt: skip
    assert first["bytes"] + second["bytes"] == total + head  # the head is whole on both
    assert max(first["bytes"], second["bytes"]) < 0.51 * total


@pytest.mark.parametrize("case", FAILING)
def test_a_row_that_fails_in_either_model_is_left_out_by_both(saved: Any, case: str) -> None:
    for rank in saved[case]:
        for name in ("replicated", "sharded"):
            assert rank[name]["rejected"] == {"bad": f"ValueError: {case}"}


@pytest.mark.parametrize("case", sorted(set(CASES) - set(FAILING)))
def test_each_row_is_trained_on_once(saved: Any, case: str) -> None:
    expected = sorted(row.trajectory for minibatch in CASES[case] for row in minibatch)
    for rank in saved[case]:
        assert rank["sharded"]["trained"] == rank["replicated"]["trained"] == expected
        assert rank["sharded"]["rejected"] == {}


def test_policy_and_critic_continue_on_one_rank(saved: Any) -> None:
    (read,) = saved["read"]
    for written in saved["written"]:
        assert read["steps"] == written["steps"] == (2, 2)
        assert read["tensors"].keys() == written["tensors"].keys()
        for name, tensor in written["tensors"].items():
            assert torch.equal(read["tensors"][name], tensor), name
        for own, expected in zip(read["values"], written["values"], strict=True):
            assert torch.equal(own, expected)
    assert any("critic" in name and float(tensor.abs().max()) > 0 for name, tensor in read["tensors"].items())
    assert list(saved["state"][0]["state"]) == list(saved["state"][1]["state"])
    assert not any("critic" in name and "master" in name for name in saved["state"][0]["state"]), "it is in the shards"


@pytest.mark.long
def test_ranks_that_share_rows_leave_out_a_row_on_which_policy_or_critic_fails(tmp_path: Path) -> None:
    done = on_ranks(2, tmp_path, "shared")
    assert done.returncode == 0, done.stdout[-4000:]
    for case in FAILING:
        first, second = (torch.load(tmp_path / f"{case}, shared {rank}.pt", weights_only=False) for rank in range(2))
        for rank in (first, second):
            own, expected = rank["sharded"], rank["replicated"]
            assert own["rejected"] == expected["rejected"] == {"bad": f"ValueError: {case}"}
            assert own["trained"] == expected["trained"]
            for part in ("policy", "critic"):
                pairs = zip(own["gradients"][part][0], expected["gradients"][part][0], strict=True)
                assert all(float((a - b).norm()) <= 0.05 * float(b.norm()) + 1e-6 for a, b in pairs)
                assert all(map(torch.equal, own["masters"][part], first["sharded"]["masters"][part]))
