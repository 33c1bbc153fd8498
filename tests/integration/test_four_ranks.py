"""A policy that is split over four ranks, or over two nodes of two, computes what one rank computes."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.processes.averages_on_ranks import KINDS
from tests.processes.context_beside import ADAPTED, BESIDE, CRITIC
from tests.processes.four_on_ranks import HYBRID, MESHES, ROWS
from tests.processes.waiting import LIMIT_S
from tests.runs.run_process import ROOT

pytestmark = [pytest.mark.servers, pytest.mark.long]
RANKS, FEWER = 4, 2


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, starting_model: Path) -> dict[str, list[dict[str, Any]]]:
    """Mesh -> results of each rank; "MESH, continued" -> those of the ranks that read its checkpoint; "MESH, beside" ->
    those of critics, adapters and averages."""
    folder = tmp_path_factory.mktemp("four")
    for number, what in ((RANKS, "train"), (FEWER, "continue")):
        launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={number}", "-m")
        done = subprocess.run(
            [sys.executable, *launcher, "tests.processes.four_on_ranks", what, str(starting_model), str(folder)],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=LIMIT_S, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-4000:]
    names = dict.fromkeys(MESHES, RANKS) | {f"{mesh}, continued": FEWER for mesh in MESHES}
    names |= {f"{mesh}, beside": RANKS for mesh in MESHES}
    return {
        name: [torch.load(folder / f"{name} {rank}.pt", weights_only=False) for rank in range(number)]
        for name, number in names.items()
    }


@pytest.mark.parametrize("mesh", MESHES)
def test_log_probs_are_those_of_one_rank_bit_for_bit(saved: Any, mesh: str) -> None:
    first = saved[mesh][0]
    assert len(first["scores"]) == len(first["alone"]) > RANKS
    assert all(map(torch.equal, first["scores"], first["alone"]))
    assert [len(rank["own scores"]) for rank in saved[mesh]] == [2, 2, 1, 1]
    for rank in saved[mesh]:
        assert all(map(torch.equal, rank["own scores"], rank["own alone"]))


@pytest.mark.parametrize("mesh", MESHES)
def test_unequal_numbers_of_rows_are_trained_as_by_whole_models(saved: Any, mesh: str) -> None:
    everything = sorted(row.trajectory for row in ROWS)
    assert sorted({len(rank["sharded"]["current"]) for rank in saved[mesh]}) == [1, 3]
    for rank in saved[mesh]:
        sharded, replicated = rank["sharded"], rank["replicated"]
        assert sharded["trained"] == replicated["trained"] == everything
        for own, expected in zip(sharded["gradients"][0], replicated["gradients"][0], strict=True):
            assert torch.allclose(own, expected, rtol=1e-5, atol=1e-6)  # the order of sums
        for own, expected in zip(sharded["masters"], replicated["masters"], strict=True):
            assert torch.allclose(own, expected, rtol=1e-5, atol=1e-5)
        assert sharded["grad_norm"] == pytest.approx(replicated["grad_norm"], rel=1e-2)
        for row, expected in replicated["current"].items():
            if row.startswith("k"):  # before the first step
                assert torch.equal(sharded["current"][row], expected)


@pytest.mark.parametrize("mesh", MESHES)
def test_ranks_hold_their_shares_and_end_with_the_same_weights(saved: Any, mesh: str) -> None:
    total = sum(4 * master.numel() for master in saved[mesh][0]["sharded"]["masters"])
    held = [rank["sharded"]["bytes"] for rank in saved[mesh]]
    assert sum(held) == total * (2 if mesh == HYBRID else 1)
    for rank in saved[mesh][1:]:
        for own, expected in zip(rank["sharded"]["masters"], saved[mesh][0]["sharded"]["masters"], strict=True):
            assert torch.equal(own, expected)


@pytest.mark.parametrize("mesh", MESHES)
def test_two_ranks_continue_from_the_checkpoint_of_four(saved: Any, mesh: str) -> None:
    written = saved[mesh][0]
    assert written["steps"] == 2
    for rank in saved[f"{mesh}, continued"]:
        assert rank["steps"] == 2
        assert rank["state"].keys() == written["state"].keys()
        for name, tensor in written["state"].items():
            assert torch.equal(rank["state"][name], tensor), name
    continued = saved[f"{mesh}, continued"][0]["scores after"]
    assert all(map(torch.equal, continued, written["scores after"]))
    assert not all(map(torch.equal, continued, written["scores"]))


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("case", BESIDE)
def test_values_of_the_critic_have_the_bits_of_a_whole_model(saved: Any, mesh: str, case: str) -> None:
    for rank in saved[f"{mesh}, beside"]:
        sharded, replicated = rank[case]["sharded"], rank[case]["replicated"]
        assert len(sharded["values"]) == len(replicated["values"]) > 0
        assert all(map(torch.equal, sharded["values"], replicated["values"]))
        assert float(replicated["values"][0].std()) > 0.5


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("part", ["policy", "critic"])
def test_policy_and_critic_are_trained_as_with_whole_models(saved: Any, mesh: str, part: str) -> None:
    for rank in saved[f"{mesh}, beside"]:
        sharded, replicated = rank[CRITIC]["sharded"], rank[CRITIC]["replicated"]
        assert sharded["trained"] == replicated["trained"]
        for own, expected in zip(sharded["gradients"][part][0], replicated["gradients"][part][0], strict=True):
            assert torch.allclose(own, expected, rtol=1e-5, atol=1e-6)  # the order of sums
        for own, expected in zip(sharded["masters"][part], replicated["masters"][part], strict=True):
            assert torch.allclose(own, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("part", ["policy", "critic"])
def test_an_adapter_and_that_of_the_critic_have_the_bits_of_whole_models(saved: Any, mesh: str, part: str) -> None:
    for rank in saved[f"{mesh}, beside"]:
        sharded, replicated = rank[ADAPTED]["sharded"], rank[ADAPTED]["replicated"]
        assert sharded["trained"] == replicated["trained"]
        assert sharded["norms"] == replicated["norms"]
        assert min(sharded["norms"][part]) > 0
        for name in ("gradients", "masters"):
            own, expected = (each[name][part] for each in (sharded, replicated))
            pairs = zip(own[0], expected[0], strict=True) if name == "gradients" else zip(own, expected, strict=True)
            assert all(torch.equal(first, second) for first, second in pairs)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("kind", KINDS)
def test_averages_have_the_bits_of_whole_models(saved: Any, mesh: str, kind: str) -> None:
    for rank in saved[f"{mesh}, beside"]:
        sharded, replicated = rank[kind]["sharded"], rank[kind]["replicated"]
        for name in ("means", "scores"):
            assert len(sharded[name]) == len(replicated[name]) > 0
            assert all(map(torch.equal, sharded[name], replicated[name]))
        assert sharded["gauges"] == pytest.approx(replicated["gauges"], rel=1e-9)
