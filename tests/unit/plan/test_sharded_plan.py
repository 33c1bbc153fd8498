"""`palimpsest plan` of a learner whose ranks share a model."""

import json
from pathlib import Path

from palimpsest.plan.command import run_command
from palimpsest.plan.learner_memory import RESULTS
from tests.unit.plan.shapes import PARAMETERS


def test_shards_of_an_average_are_counted_once_over_the_ranks(run_file: Path) -> None:
    words = [str(run_file), "--gpus", "4x80", "--json", "--learner.proximal.kind=ewma_prox", "--local.learner_ranks=4"]
    shared_rows = ("--learner.context_parallel=2", "--learner.layout=packed", "--model.attention=sdpa")
    alone, split, shared = (
        json.loads(run_command([*words, f"--learner.sharding={value}", *more])[0])["learner"]
        for value, more in (("none", ()), ("full", ()), ("full", shared_rows))
    )
    for name in ("average of the weights, float32", "average in the model's type"):
        assert split["held"][name] == shared["held"][name] == -(-alone["held"][name] // 4)
    assert "keys and values of the ranks that share rows" in shared["moments"]["old log-probs"]


def test_a_sharded_rank_holds_its_share_and_gathers_blocks(run_file: Path) -> None:
    text, _ = run_command(
        [str(run_file), "--gpus=8x80", "--json", "--learner.sharding=full", "--local.learner_ranks=4"]
    )
    learner = json.loads(text)["learner"]
    quarter = PARAMETERS  # 4 bytes of a fourth of the parameters
    assert {name: size for name, size in learner["held"].items() if not name.startswith("batch:")} == {
        "masters, float32": quarter,
        "gradients, float32": quarter,
        "moments of AdamW, float32": 2 * quarter,
        "weights of an old version": -(-json.loads(text)["model"]["bytes"] // 4),
    }
    outside = 512 * 64 + 64
    block = (PARAMETERS - outside) // 2
    training = learner["moments"]["training pass"]
    assert training["weights gathered from the ranks, bf16"] == 2 * (outside + 3 * block)
    assert training["gradients that wait to be sent, bf16"] == 2 * (outside + block)
    assert training["gradients sent to the ranks, float32"] == 4 * max(outside, block)
    assert set(learner["moments"]["optimizer step"]) == {"denominators of AdamW, float32", RESULTS}


def test_a_sharded_rank_holds_its_share_of_the_critic(run_file: Path) -> None:
    words = [str(run_file), "--gpus=8x80", "--json", "--learner.advantages.kind=gae", "--local.learner_ranks=4"]
    alone, split = (
        json.loads(run_command([*words, f"--learner.sharding={value}"])[0])["learner"]["held"]
        for value in ("none", "full")
    )
    assert alone["critic with its optimizer"] == 18 * PARAMETERS
    assert split["critic with its optimizer"] == 4 * PARAMETERS  # 16 bytes of a fourth, and no copy in bf16


def test_a_sharded_rank_holds_its_share_of_the_base_for_each_model_and_all_of_the_adapter(run_file: Path) -> None:
    keys = ("--learner.lora.rank=4", "--learner.loss.kl.weight=0.1", "--learner.advantages.kind=gae")
    words = [str(run_file), "--gpus=8x80", "--json", "--local.learner_ranks=4", *keys]
    alone, split = (
        json.loads(run_command([*words, f"--learner.sharding={value}"])[0])["learner"] for value in ("none", "full")
    )
    adapter = 4 * 2 * ((64 + 64) + 2 * (64 + 32) + (64 + 64) + 3 * (64 + 192))
    base = 2 * PARAMETERS // 4
    for name in ("masters, float32", "gradients, float32", "moments of AdamW, float32"):
        assert split["held"][name] == alone["held"][name]
    for name in ("weights of an old version", "weights of version 0"):
        assert split["held"][name] == base + alone["held"][name]
        assert split["held"]["weights"] == split["held"][name]
    assert split["held"]["critic with its optimizer"] == base + alone["held"]["critic with its optimizer"]
    assert alone["held"]["critic with its optimizer"] == 18 * adapter
    training = split["moments"]["training pass"]
    outside = 512 * 64 + 64
    assert training["weights gathered from the ranks, bf16"] == 2 * (outside + 3 * (PARAMETERS - outside) // 2)
    assert "gradients sent to the ranks, float32" not in training
    assert split["moments"]["optimizer step"] == alone["moments"]["optimizer step"]


def test_shards_are_a_remedy_for_several_ranks(run_file: Path) -> None:
    text, _ = run_command([str(run_file), "--gpus=8x1.001", "--local.learner_ranks=2"])
    assert 'micro_batch_tokens = 64 and learner.sharding = "full": peak' in text
    text, _ = run_command([str(run_file), "--gpus=8x1.001"])
    assert "learner.sharding" not in text
