"""A policy that is split over two ranks computes what a replicated one computes."""

import subprocess
import sys
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from tests.learner_parts import families
from tests.learner_parts.models import build
from tests.processes.shard_on_ranks import AGAIN, CASES, EXPERTS, HYBRID, OFFLOAD, ONE, PACKED, THREE, UNTIED
from tests.processes.waiting import LIMIT_S
from tests.runs.run_process import ROOT

pytestmark = pytest.mark.servers

FILES = (*CASES, "versions", "checkpoint", "canaries")


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Case -> results of each rank."""
    folder = tmp_path_factory.mktemp("sharded")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m")
    models = [*(str(build(tied=tied)) for tied in (True, False)), str(families.build("Qwen3-MoE", folder / "model"))]
    done = subprocess.run(
        [sys.executable, *launcher, "tests.processes.shard_on_ranks", *models, str(folder)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=LIMIT_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    return {case: [torch.load(folder / f"{case} {rank}.pt", weights_only=False) for rank in range(2)] for case in FILES}


@pytest.mark.parametrize("case", CASES)
def test_forward_passes_are_equal_bit_for_bit(both: Any, case: str) -> None:
    for rank in both[case]:
        replicated, sharded = rank["replicated"], rank["sharded"]
        for of in ("scores", "own"):
            assert len(sharded[of]) == len(replicated[of])
            for own, expected in zip(sharded[of], replicated[of], strict=True):
                assert torch.equal(own, expected)
        if len(CASES[case]) == 1:  # a second minibatch comes after a step
            assert sharded["current"].keys() == replicated["current"].keys()
            for row, expected in replicated["current"].items():
                assert torch.equal(sharded["current"][row], expected)


@pytest.mark.parametrize("case", CASES)
def test_gradients_and_steps_are_equal_up_to_the_order_of_sums(both: Any, case: str) -> None:
    for rank in both[case]:
        replicated, sharded = rank["replicated"], rank["sharded"]
        assert len(sharded["gradients"]) == len(replicated["gradients"]) == len(CASES[case])
        for own, expected in zip(sharded["gradients"][0], replicated["gradients"][0], strict=True):
            if case in (ONE, UNTIED, HYBRID, AGAIN, EXPERTS, OFFLOAD, PACKED):
                assert torch.equal(own, expected)
            else:
                # bf16 gradients of up to three micro-batches of two ranks, added in float32
                assert torch.allclose(own, expected, rtol=1e-5, atol=1e-6)
        assert any(float(gradient.abs().max()) > 1e-3 for gradient in sharded["gradients"][0])
        for own, expected in zip(sharded["masters"], replicated["masters"], strict=True):
            assert torch.allclose(own, expected, rtol=1e-5, atol=1e-5)
        assert sharded["loss"] == pytest.approx(replicated["loss"], rel=1e-2, abs=1e-5)
        if case in (ONE, UNTIED, HYBRID, AGAIN, EXPERTS, OFFLOAD, PACKED):
            assert sharded["grad_norm"] == pytest.approx(replicated["grad_norm"], rel=1e-5)
        assert sharded["grad_norm"] == pytest.approx(replicated["grad_norm"], rel=1e-2)


@pytest.mark.parametrize("case", CASES)
def test_each_row_is_trained_on_once_and_no_empty_pass_is_reported(both: Any, case: str) -> None:
    expected = sorted(row.trajectory for minibatch in CASES[case] for row in minibatch)
    for rank in both[case]:
        assert rank["sharded"]["trained"] == rank["replicated"]["trained"] == expected


def test_checkpointed_layers_are_computed_again_in_the_backward_pass(both: Any) -> None:
    for usual, again in zip(both[ONE], both[AGAIN], strict=True):
        for name in ("replicated", "sharded"):
            assert again[name]["calls"] == usual[name]["calls"] + 1


def test_an_offloaded_optimizer_changes_no_bit(both: Any) -> None:
    for usual, offloaded in zip(both[ONE], both[OFFLOAD], strict=True):
        for name in ("replicated", "sharded"):
            for part in ("masters", "gradients"):
                own, expected = (torch.cat([t.flatten() for t in _flat(one[name][part])]) for one in (offloaded, usual))
                assert torch.equal(own, expected)


def _flat(tensors: Any) -> list[torch.Tensor]:
    return [each for part in tensors for each in (part if isinstance(part, list) else [part])]


def test_all_ranks_end_with_the_same_weights_and_each_holds_half_of_them(both: Any) -> None:
    first, second = (rank["sharded"] for rank in both[THREE])
    for own, other in zip(first["masters"], second["masters"], strict=True):
        assert torch.equal(own, other)
    total = sum(4 * master.numel() for master in first["masters"])
    assert first["bytes"] + second["bytes"] == total
    assert max(first["bytes"], second["bytes"]) < 0.51 * total


def test_a_sharded_shadow_walks_to_the_published_bits(both: Any) -> None:
    for rank in both["versions"]:
        assert rank["held"].keys() == {0, 1, 2}
        for version, held in rank["held"].items():
            assert held.keys() == rank["expected"][version].keys()
            for name, expected in rank["expected"][version].items():
                assert torch.equal(held[name].view(torch.int16), expected.view(torch.int16))
        assert not all(torch.equal(one, rank["held"][1][name]) for name, one in rank["held"][0].items())


def test_two_ranks_store_versions_with_the_digest_of_one(both: Any) -> None:
    first, second = both["versions"]
    assert {*first["own"]} | {*second["own"]} == first["sizes"].keys()
    assert not {*first["own"]} & {*second["own"]}
    manifests = {version: manifest for version, manifest in first["manifests"].items() if version < 3}
    assert {version: manifest.digest for version, manifest in manifests.items()} == {
        version: first["alone"][version] for version in range(3)
    }
    assert [len(manifest.parts) for manifest in manifests.values()] == [2, 2, 2]
    assert [manifest.parent is not None for manifest in manifests.values()] == [False, True, True]


def test_each_rank_keeps_its_part_of_a_version_and_nothing_else(both: Any) -> None:
    total, largest = sum(both["versions"][0]["sizes"].values()), max(both["versions"][0]["sizes"].values())
    for rank in both["versions"]:
        own = sum(rank["sizes"][name] for name in rank["own"])
        assert own <= total / 2 + largest
        assert rank["held_bytes"] == [own] * 4
        assert rank["storages"] == {rank["sizes"][name] for name in rank["own"]}, "no view of a larger tensor"


def test_all_ranks_refuse_a_version_that_is_damaged_or_lost_for_one_of_them(both: Any) -> None:
    for rank in both["versions"]:
        lost, damaged = rank["errors"]
        assert "version 4 is not there" in lost or "for another rank" in lost
        assert "snapshot 3 is damaged" in damaged


def test_one_rank_transfers_each_object_for_both_and_again_once_if_its_file_is_damaged(both: Any) -> None:
    first, second = (rank["served"] for rank in both["versions"])
    whole, damaged = (Counter(own) + Counter(other) for own, other in zip(first, second, strict=True))
    assert whole == {0: 1, 1: 1, 2: 1, 3: 1}
    assert damaged == {0: 1, 1: 1, 2: 2, 3: 1}


def test_a_policy_continues_from_the_shards_of_a_checkpoint(both: Any) -> None:
    first, second = both["checkpoint"]
    assert first["files"] == second["files"]
    assert len(first["files"]) == 3  # of each rank, and the metadata
    for rank in both["checkpoint"]:
        assert rank["steps"] == 1
        assert any(float(tensor.abs().max()) > 0 for name, tensor in rank["before"].items() if "exp_avg" in name)
        for name, tensor in rank["before"].items():
            assert torch.equal(rank["after"][name], tensor)


def test_canaries_are_those_of_a_whole_model(both: Any) -> None:
    for rank in both["canaries"]:
        assert rank["sharded"] == rank["alone"]
        assert rank["sharded"][0] != rank["sharded"][1]  # bf16 and float32
        sharded, alone = rank["sampled"]
        assert all(np.array_equal(own, expected) for own, expected in zip(sharded, alone, strict=True))
