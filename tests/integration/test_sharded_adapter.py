"""An adapter on weights that are split over two ranks is that of a replicated learner, bit for bit."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from palimpsest.common.base_model import base_digest
from tests.integration.test_lora_run import LORA, rescored
from tests.learner_parts import families
from tests.learner_parts.models import build
from tests.processes.adapter_on_ranks import CASES, CRITIC, FAILING, ONE, UNEVEN
from tests.processes.waiting import LIMIT_S
from tests.runs.endless import ENDLESS, kill_a_learner, stop_after_two_versions
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


def four_layers(folder: Path) -> Path:
    """A model whose first layers a backward pass does not reach if only the last one has an adapter."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, tie_word_embeddings=True,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Case -> results of each rank."""
    folder = tmp_path_factory.mktemp("adapters")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m")
    models = [
        str(build(tied=True)), str(four_layers(folder / "deep")), str(families.build("Qwen3-MoE", folder / "experts")),
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, *launcher, "tests.processes.adapter_on_ranks", *models, str(folder)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=LIMIT_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    files = (*CASES, "versions")
    return {case: [torch.load(folder / f"{case} {rank}.pt", weights_only=False) for rank in range(2)] for case in files}


def equal(own: Any, expected: Any) -> bool:
    """Whether two tensors, or lists or dictionaries of tensors, are equal. NaN equals NaN."""
    if isinstance(own, torch.Tensor):
        return own.shape == expected.shape and torch.allclose(own, expected, rtol=0, atol=0, equal_nan=True)
    if isinstance(own, dict):
        return own.keys() == expected.keys() and all(equal(own[name], expected[name]) for name in own)
    return len(own) == len(expected) and all(equal(*each) for each in zip(own, expected, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_a_new_adapter_is_drawn_as_without_shards_and_every_rank_takes_that_of_rank_0(both: Any, case: str) -> None:
    first = both[case][0]["replicated"]["adapter"]
    for rank in both[case]:
        assert equal(rank["sharded"]["drawn"], rank["replicated"]["drawn"])
        assert equal(rank["sharded"]["adapter"], first)
        assert equal(rank["replicated"]["adapter"], first)


@pytest.mark.parametrize("case", sorted(set(CASES) - set(FAILING)))
def test_log_probs_are_equal_bit_for_bit(both: Any, case: str) -> None:
    for rank in both[case]:
        for of in ("scores", "own"):
            assert equal(rank["sharded"][of], rank["replicated"][of])
    assert any(float(values.std()) > 1e-3 for values in map(torch.as_tensor, both[case][0]["sharded"]["scores"]))


@pytest.mark.parametrize("case", CASES)
def test_gradients_steps_and_the_published_bytes_are_equal(both: Any, case: str) -> None:
    """With any number of micro-batches: each rank sums its own first, as without shards."""
    for rank in both[case]:
        replicated, sharded = rank["replicated"], rank["sharded"]
        assert len(sharded["gradients"]) == len(CASES[case])
        assert equal(sharded["gradients"], replicated["gradients"])
        assert any(float(gradient.abs().max()) > 1e-4 for gradient in sharded["gradients"][0])
        assert sharded["norms"] == replicated["norms"]
        assert equal(sharded["state"], replicated["state"])
        assert sharded["published"] == replicated["published"] == both[case][0]["sharded"]["published"]
        assert all(".lora_" in name for name, _ in sharded["published"])
        assert (sharded["loss"], sharded["rejected"]) == (replicated["loss"], replicated["rejected"])
        assert sharded["rejected"] == ({"bad": f"ValueError: {case}"} if case in FAILING else {})
        assert sharded["gauges"] == pytest.approx(replicated["gauges"], nan_ok=True)


def test_the_base_is_split(both: Any) -> None:
    first, second = (rank["sharded"]["bytes"] for rank in both[ONE])
    assert max(first, second) < 0.51 * (first + second)


def test_averages_are_those_of_a_replicated_adapter(both: Any) -> None:
    for rank in both[UNEVEN]:
        assert equal(rank["sharded"]["average"], rank["replicated"]["average"])
        assert float(rank["sharded"]["average"][0].std()) > 1e-3


def test_the_critic_has_an_adapter_that_is_trained(both: Any) -> None:
    for rank in both[CRITIC]:
        assert equal(rank["sharded"]["of_critic"], rank["replicated"]["of_critic"])
        assert any(float(gradient.abs().max()) > 1e-4 for gradient in rank["sharded"]["of_critic"][0])


def test_a_sharded_shadow_holds_the_published_adapter_and_all_ranks_miss_a_version_that_one_lacks(both: Any) -> None:
    for rank in both["versions"]:
        assert len(rank["held"]) == 4
        for (own, values), (expected, exact) in rank["held"]:
            assert equal(own, expected)
            assert torch.equal(values, exact)
        assert not torch.equal(rank["held"][0][0][1], rank["held"][1][0][1])
        (missing,) = rank["errors"]
        assert "version 3 is not there" in missing or "version 3 is not in the store for another rank" in missing


def test_canaries_are_those_of_a_whole_model(both: Any) -> None:
    for rank in both["versions"]:
        (low, expected_low), (high, expected_high) = rank["canaries"]
        assert (low, high) == (expected_low, expected_high)
        assert low != high


@pytest.mark.long
def test_a_run_on_shards_continues_without_them(tmp_path: Path, starting_model: Path) -> None:
    base = base_digest(str(starting_model))
    toml, home = scripted(tmp_path, starting_model, versions=1), tmp_path / "scripted"
    run = RunProcess(toml, ENDLESS, "--local.learner_ranks=2", "--learner.sharding=full", *LORA)
    try:
        wait_for(lambda: len(history(home)) >= 2, run, name="version 2")
        kill_a_learner(run, ranks=2)
        versions = stop_after_two_versions(run, home) + 2
    finally:
        run.kill_everything()
    assert not newest_manifest(home)["shards"]
    more = f"--learner.versions={versions}"
    code, output = RunProcess(toml, "--resume", home, more, "--learner.sharding=none", *LORA).finish()
    assert code == 0, output[-3000:]
    check_whole_groups(check_ledger(home), groups=versions * 4, samples=4)
    assert [line["exact"] for line in history(home)] == [True] * versions
    assert newest_manifest(home)["adapter"]["base"] == base
    compared = rescored(home)
    assert compared["versions"] > 1
    assert compared["same_layout_tokens"] > 0
    assert compared["same_layout_unequal"] == 0

    for options in ((), ("--adapter",)):
        done = subprocess.run(
            [sys.executable, "-m", "palimpsest", "export", str(home), *options, str(tmp_path / f"out{len(options)}")],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=LIMIT_S, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-2000:]
