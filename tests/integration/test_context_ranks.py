"""Ranks that share rows compute what one rank computes with whole rows (learner.context_parallel)."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from palimpsest.services.learner.batch.batching import FREE
from tests.learner_parts import families
from tests.processes.context_averages import AVERAGED
from tests.processes.context_beside import BESIDE, MINIBATCHES
from tests.processes.context_on_ranks import CASES, EXPERTS, FORWARD
from tests.processes.waiting import LIMIT_S
from tests.runs.run_process import ROOT

pytestmark = pytest.mark.servers
FAMILIES = ("Qwen3", "Llama (untied)", "Qwen3-MoE")
ROUNDING = 0.05
"""Nats: bf16 rounding of a random model, as tests/unit/learner/model/test_packing.py bounds it."""


def on_ranks(number: int, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run the program on this number of ranks."""
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={number}", "-m")
    return subprocess.run(
        [sys.executable, *launcher, "tests.processes.context_on_ranks", *arguments],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=LIMIT_S, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module", params=[2, 4])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Family, EXPERTS or "attention" -> results of each rank; two ranks share each row."""
    folder: Path = tmp_path_factory.mktemp("context")
    models = [str(families.build(family, folder / family)) for family in FAMILIES]
    done = on_ranks(request.param, *models, str(folder))
    assert done.returncode == 0, done.stdout[-4000:]
    return {
        name: [torch.load(folder / f"{name} {rank}.pt", weights_only=False) for rank in range(request.param)]
        for name in ("attention", *CASES, EXPERTS, *BESIDE, *AVERAGED)
    }


def test_attention_across_ranks_is_that_of_whole_rows(saved: Any) -> None:
    for rank in saved["attention"]:
        for part in ("output", "gradients"):
            for own, expected in zip(rank["shared"][part], rank["alone"][part], strict=True):
                assert float(expected.abs().max()) > 0.1
                assert torch.allclose(own, expected, atol=1e-5)


def test_keys_and_values_get_gradients_from_the_queries_of_other_ranks(saved: Any) -> None:
    for rank in saved["attention"][:1]:  # the first chunk is seen by every other one
        for own, expected in list(zip(rank["gradients stay"]["gradients"], rank["alone"]["gradients"], strict=True))[
            1:
        ]:
            assert not torch.allclose(own, expected, atol=1e-2)


@pytest.mark.parametrize("family", CASES)
def test_rows_have_the_log_probs_and_entropies_of_one_rank(saved: Any, family: str) -> None:
    for rank in saved[family]:
        for part in ("logprobs", "entropies"):
            own, expected = rank["shared"][part], rank["alone"][part]
            assert int(own.ne(0).sum()) == sum(row.trainable for row in FORWARD)
            assert torch.allclose(own, expected, atol=ROUNDING)
        assert len(rank["shared"]["scores"]) in (0, len(rank["alone"]["scores"]))  # those of rank 0
        for own, expected in zip(rank["shared"]["scores"], rank["alone"]["scores"], strict=False):
            assert torch.allclose(own, expected, atol=ROUNDING)
        if len(saved[family]) == 2:  # one group has all rows
            for own, expected in zip(rank["shared"]["own"], rank["alone"]["own"], strict=True):
                assert torch.allclose(own, expected, atol=ROUNDING)


@pytest.mark.parametrize("family", CASES)
def test_positions_without_their_offset_give_other_log_probs(saved: Any, family: str) -> None:
    for rank in saved[family]:
        assert not torch.allclose(rank["shared positions"]["logprobs"], rank["alone"]["logprobs"], atol=2 * ROUNDING)


@pytest.mark.parametrize("family", CASES)
def test_a_version_is_trained_as_on_one_rank(saved: Any, family: str) -> None:
    rows = sorted(row.trajectory for minibatch in CASES[family] for row in minibatch)
    for rank in saved[family]:
        shared, alone = rank["shared"], rank["alone"]
        assert shared["trained"] == alone["trained"] == rows
        for own, expected in zip(shared["gradients"][0], alone["gradients"][0], strict=True):
            scale = float(expected.float().norm())
            assert float((own.float() - expected.float()).norm()) <= 0.05 * scale + 1e-6
        assert any(float(gradient.abs().max()) > 1e-3 for gradient in shared["gradients"][0])
        assert shared["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-2)
        assert shared["loss"] == pytest.approx(alone["loss"], rel=1e-2, abs=1e-5)
        for own, expected in zip(shared["masters"], alone["masters"], strict=True):
            assert torch.allclose(own, expected, rtol=1e-3, atol=2e-4)


def test_a_mixture_replays_and_records_the_experts_of_whole_rows(saved: Any) -> None:
    """Other experts would change the log-probs by more than rounding. Where two experts have nearly equal scores,
    rounding may change the choice."""
    for rank in saved[EXPERTS]:
        shared, alone = rank["shared"], rank["alone"]
        assert torch.allclose(shared["logprobs"], alone["logprobs"], atol=ROUNDING)
        (own,), (expected,) = shared["chosen"], alone["chosen"]
        assert own.shape == expected.shape
        assert ((own == FREE) == (expected == FREE)).all()
        assert float((own == expected).mean()) > 0.95
        assert shared["trained"] == alone["trained"]
        assert shared["grad_norm"] == pytest.approx(alone["grad_norm"], rel=2e-2)
        for gradient, of_one in zip(shared["gradients"][0], alone["gradients"][0], strict=True):
            scale = float(of_one.float().norm())
            assert float((gradient.float() - of_one.float()).norm()) <= 0.1 * scale + 1e-6


@pytest.mark.parametrize("case", BESIDE)
def test_values_of_the_critic_are_those_of_whole_rows(saved: Any, case: str) -> None:
    first = saved[case][0]["shared"]["values"]
    for rank in saved[case]:
        for own, expected, same in zip(rank["shared"]["values"], rank["alone"]["values"], first, strict=True):
            assert float(expected.std()) > 0.5
            assert torch.allclose(own, expected, atol=2 * ROUNDING)
            assert torch.equal(own, same)


@pytest.mark.parametrize("case", BESIDE)
@pytest.mark.parametrize("part", ["policy", "critic"])
def test_policy_and_critic_are_trained_as_on_whole_rows(saved: Any, case: str, part: str) -> None:
    first = saved[case][0]["shared"]["masters"][part]
    for rank in saved[case]:
        shared, alone = rank["shared"], rank["alone"]
        assert shared["trained"] == alone["trained"] == sorted(row.trajectory for rows in MINIBATCHES for row in rows)
        assert len(shared["gradients"][part]) == len(alone["gradients"][part]) == len(MINIBATCHES)
        for own, expected in zip(shared["gradients"][part][0], alone["gradients"][part][0], strict=True):
            assert float((own - expected).norm()) <= 0.05 * float(expected.norm()) + 1e-6
        assert any(float(gradient.abs().max()) > 1e-3 for gradient in shared["gradients"][part][0])
        norms, of_one = shared["norms"][part], alone["norms"][part]
        assert norms[0] == pytest.approx(of_one[0], rel=3e-2)
        assert norms[1] == pytest.approx(of_one[1], rel=1e-1)  # its weights differ by rounding
        assert shared["loss"] == pytest.approx(alone["loss"], rel=3e-2)
        for own, expected, same in zip(shared["masters"][part], alone["masters"][part], first, strict=True):
            assert torch.allclose(own, expected, rtol=1e-3, atol=4e-4)
            assert torch.equal(own, same)


@pytest.mark.parametrize("kind", AVERAGED)
def test_the_average_scores_rows_that_ranks_share(saved: Any, kind: str) -> None:
    first = saved[kind][0]["shared"]["scores"]
    for rank in saved[kind]:
        shared, alone = rank["shared"], rank["alone"]
        assert len(shared["means"]) == len(alone["means"]) > 0
        assert all(map(torch.equal, shared["means"], alone["means"]))
        assert shared["gauges"] == alone["gauges"] == saved[kind][0]["shared"]["gauges"]
        for own, expected, same in zip(shared["scores"], alone["scores"], first, strict=True):
            assert torch.allclose(own, expected, atol=ROUNDING)
            assert torch.equal(own, same)
        if kind != "a guarded reset":  # its average is the version before the newest
            assert not torch.allclose(shared["scores"][0], shared["newest"], atol=4 * ROUNDING)
        assert torch.allclose(shared["newest"], alone["newest"], atol=ROUNDING)


def test_ranks_that_share_rows_have_the_same_values(saved: Any) -> None:
    for family in CASES:
        first, second = saved[family][:2]
        for part in ("logprobs", "entropies"):
            assert torch.equal(first["shared"][part], second["shared"][part])


def test_canaries_and_old_versions_are_those_of_one_rank(saved: Any) -> None:
    for rank in saved["Qwen3"]:
        found = rank["canaries"]
        for own, expected in zip(found["sharded"], found["alone"], strict=True):
            for row, values in zip(own, expected, strict=True):
                assert row[0] == pytest.approx(values[0], abs=ROUNDING)
        assert found["sharded"][1] != found["sharded"][0]  # float32 and bf16
        for version, held in rank["walked"]["held"].items():
            for name, values in held.items():
                assert torch.equal(values.flatten(), rank["walked"]["expected"][version][name].flatten())
