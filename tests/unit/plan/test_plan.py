"""`palimpsest plan`: rehearsed bytes against counted ones, sums by hand, what does not fit."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen3MoeConfig

from palimpsest.common.config.engines import VllmEngineConfig
from palimpsest.common.config.learner import OptimizerConfig
from palimpsest.common.config.lora import LoraConfig
from palimpsest.common.config.schema import RunConfig
from palimpsest.common.user_error import UserError
from palimpsest.common.versions import Version
from palimpsest.plan.causes import Cause, Memory, Moment
from palimpsest.plan.command import run_command
from palimpsest.plan.engine_memory import EngineMemory, engine_memory
from palimpsest.plan.gpus import Gpus, parse
from palimpsest.plan.learner_memory import learner_memory, most_rows, pass_shape
from palimpsest.plan.live_bytes import LiveBytes
from palimpsest.plan.rehearsal import rehearse
from palimpsest.services.learner.distributed import ProcessGroup
from palimpsest.services.learner.model.lora import add_adapter
from palimpsest.services.learner.model.policy import checkpoint_activations, load_model
from palimpsest.services.learner.model.trainable import TrainablePolicy
from palimpsest.services.learner.proximal.surrogates.current_recompute import CurrentRecompute
from tests.learner_parts.models import CPU, CurrentModel, train
from tests.records.builders import UNCORRECTED, a_learner, a_row
from tests.unit.plan.shapes import DENSE, PARAMETERS, SHAPE

LENGTH, ROWS = 120, 4
UNTIED = LlamaConfig(**{**SHAPE, "architectures": ["LlamaForCausalLM"]}, tie_word_embeddings=False)
EXPERTS = Qwen3MoeConfig(
    **{**SHAPE, "architectures": ["Qwen3MoeForCausalLM"]},
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=64,
)


@pytest.mark.parametrize(
    ("config", "chunk", "checkpointing", "rank"),
    [
        *itertools.product([DENSE, UNTIED, EXPERTS], [64, 1024], [0, 1], [0]),
        (DENSE, 64, 2, 0),
        (DENSE, 64, 0, 8),
        (DENSE, 1024, 1, 8),
    ],
)
def test_the_plan_of_a_version_is_within_ten_percent_of_what_the_trainer_holds(
    config: PretrainedConfig, chunk: int, checkpointing: int, rank: int, tmp_path: Path
) -> None:
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    model = load_model(str(tmp_path), torch.device("cpu"), "sdpa", logprob_chunk_tokens=chunk)
    lora = LoraConfig(rank=rank)
    if rank:
        add_adapter(model, lora)
    if checkpointing:
        checkpoint_activations(model, every=checkpointing)
    policy, source = TrainablePolicy(model, OptimizerConfig(lr=1e-3)), CurrentModel(model)
    learner = a_learner(
        discrepancy=UNCORRECTED, micro_batch_tokens=ROWS * LENGTH, groups_per_batch=1, logprob_chunk_tokens=chunk,
        activation_checkpointing=checkpointing > 0, activation_checkpointing_every=max(1, checkpointing), lora=lora,
    )  # fmt: skip
    rows = [
        a_row(f"r{i}", [3 + (i + t) % 200 for t in range(LENGTH)], [0] * LENGTH, advantage=(-1.0) ** i)
        for i in range(ROWS)
    ]
    train(policy, source, ProcessGroup(), [rows], Version(0), config=learner)  # makes the moments
    moments = [each for state in policy.optimizer.state.values() for each in state.values()]
    held = [*model.parameters(), *model.buffers(), *policy.masters, *policy.gradients(), *moments]
    with LiveBytes(held) as live:
        train(policy, source, ProcessGroup(), [rows], Version(1), config=learner)

    shape, samples = pass_shape(learner, LENGTH, "sdpa"), ROWS
    assert (shape.rows, shape.length) == (ROWS, LENGTH)
    memory = learner_memory(learner, rehearse(str(tmp_path), shape), shape, ranks=1, samples=samples, gpu=False)
    assert memory.largest.size == pytest.approx(live.peak, rel=0.1)
    weights = sum(tensor.numel() * tensor.element_size() for tensor in held)
    others = [cause for cause in memory.held if cause.name == "weights of an old version" or "batch:" in cause.name]
    assert len(others) == 4
    without_others = memory.static - sum(cause.size for cause in others)
    assert without_others == pytest.approx(weights, rel=1e-3)  # AdamW's step counts are tensors too


@pytest.mark.parametrize("rank", [0, 8])
def test_the_plan_of_packed_rows_counts_no_padding(rank: int, tmp_path: Path) -> None:
    """A pass of one row of the greatest length and shorter ones; the loss has tensors of their rectangle besides."""
    AutoModelForCausalLM.from_config(DENSE, dtype=torch.bfloat16).save_pretrained(tmp_path)
    model, lora = load_model(str(tmp_path), CPU, "sdpa", layout="packed"), LoraConfig(rank=rank)
    if rank:
        add_adapter(model, lora)
    policy, source = TrainablePolicy(model, OptimizerConfig(lr=1e-3)), CurrentRecompute(model, CPU)
    learner = a_learner(
        discrepancy=UNCORRECTED, micro_batch_tokens=2 * LENGTH, groups_per_batch=1, layout="packed", lora=lora
    )
    lengths = [LENGTH, *[LENGTH // 6] * 6]
    rows = [
        a_row(f"r{i}", [3 + (i + t) % 200 for t in range(length)], [0] * length, advantage=(-1.0) ** i)
        for i, length in enumerate(lengths)
    ]
    train(policy, source, ProcessGroup(), [rows], Version(0), config=learner)
    moments = [each for state in policy.optimizer.state.values() for each in state.values()]
    held = [*model.parameters(), *model.buffers(), *policy.masters, *policy.gradients(), *moments]
    with LiveBytes(held) as live:
        result = train(policy, source, ProcessGroup(), [rows], Version(1), config=learner)
    assert len(result.micro_batches) == 1

    shape, samples = pass_shape(learner, LENGTH, "sdpa"), len(lengths)
    assert (shape.tokens, shape.packed) == (2 * LENGTH, True)
    memory = learner_memory(learner, rehearse(str(tmp_path), shape), shape, ranks=1, samples=samples, gpu=False)
    assert memory.largest.size == pytest.approx(live.peak, rel=0.1)
    filled = pass_shape(learner.model_copy(update={"micro_batch_tokens": 2 * LENGTH + 50}), LENGTH, "sdpa")
    assert (filled.rows, filled.rest, filled.tokens) == (2, 50, 2 * LENGTH + 50)


def test_a_pass_has_no_more_rows_than_the_batch() -> None:
    learner = a_learner(discrepancy=UNCORRECTED, micro_batch_tokens=8 * LENGTH + 50, groups_per_batch=3)
    for layout, most, rows, rest in (
        ("padded", 6, 6, 0), ("padded", 9, 8, 0), ("padded", None, 8, 0),
        ("packed", 6, 6, 0), ("packed", 8, 8, 0), ("packed", 9, 8, 50),
    ):  # fmt: skip
        shape = pass_shape(learner.model_copy(update={"layout": layout}), LENGTH, "sdpa", most_rows=most)
        assert (shape.rows, shape.rest) == (rows, rest)


@pytest.mark.parametrize(
    ("keys", "rows"),
    [
        ({}, 12),
        ({"local": {"learner_ranks": 2}}, 6),
        ({"local": {"learner_ranks": 5}}, 3),
        ({"learner": {"minibatches": 2}, "local": {"learner_ranks": 5}}, 4),
    ],
)
def test_the_rows_of_a_rank_are_those_of_its_share_of_the_batch(keys: dict[str, Any], rows: int) -> None:
    learner = {"versions": 1, "groups_per_batch": 3, "proximal": {"kind": "current_recompute"}}
    run = {"model": {"path": "m"}, "tasks": {"environments": {"lookup": 1.0}, "samples_per_group": 4}}
    config = RunConfig.model_validate(run | keys | {"learner": learner | keys.get("learner", {})})
    assert most_rows(config) == rows


def test_a_rank_that_shares_rows_holds_its_part_of_the_activations(tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(DENSE, dtype=torch.bfloat16).save_pretrained(tmp_path)
    learner = a_learner(discrepancy=UNCORRECTED, micro_batch_tokens=8 * LENGTH, layout="packed", sharding="full")
    kept = []
    for context in (1, 2):
        shape = pass_shape(learner.model_copy(update={"context_parallel": context}), 8 * LENGTH, "sdpa")
        assert shape.own_tokens == 8 * LENGTH // context
        memory = learner_memory(learner, rehearse(str(tmp_path), shape), shape, ranks=2, samples=2, gpu=False)
        causes = {cause.name: cause.size for cause in memory.moments[1].causes}
        kept.append(causes["activations kept for the backward pass"])
        keys = 2 * 2 * DENSE.num_key_value_heads * DENSE.head_dim
        held = DENSE.num_hidden_layers + 3  # and of one layer in another order, and two gradients
        assert causes.get("keys and values of the ranks that share rows", 0) == (
            held * 8 * LENGTH * keys if context > 1 else 0
        )
    assert kept[1] == pytest.approx(kept[0] / 2, rel=0.02)


def test_with_an_adapter_only_the_base_has_the_models_size(run_file: Path) -> None:
    text, _ = run_command([str(run_file), "--gpus=2x80", "--json", "--learner.lora.rank=4"])
    with_start, _ = run_command(
        [str(run_file), "--gpus=2x80", "--json", "--learner.lora.rank=4", "--learner.lora.start=none"]
    )
    assert with_start == text, "a plan does not read the adapter that the run begins with"
    plan = json.loads(text)
    layer = (64 + 64) + 2 * (64 + 32) + (64 + 64) + 3 * (64 + 192)  # inputs and outputs of the seven layers of a block
    held = plan["learner"]["held"]
    assert held["masters, float32"] == held["gradients, float32"] == 4 * 4 * 2 * layer
    assert held["moments of AdamW, float32"] == 8 * 4 * 2 * layer
    assert held["weights"] - held["weights of an old version"] == 2 * PARAMETERS


def test_bytes_held_all_the_time_are_those_of_the_parameters(run_file: Path) -> None:
    text, code = run_command([str(run_file), "--gpus=2x80", "--json"])
    plan = json.loads(text)
    assert (code, plan["fits"], plan["misfits"]) == (0, True, [])
    assert plan["model"]["parameters"] == PARAMETERS
    held = plan["learner"]["held"]
    assert held["masters, float32"] == held["gradients, float32"] == 4 * PARAMETERS
    assert held["moments of AdamW, float32"] == 8 * PARAMETERS
    assert held["weights"] == held["weights of an old version"] == plan["model"]["bytes"]
    assert 2 * PARAMETERS <= held["weights"] < 2 * PARAMETERS + 1000  # and the frequencies of the positions
    assert plan["learner"]["pass"] == {"rows": 2, "length": 64}
    assert plan["engine"]["cache_tokens"] == (int(80 * 2**30 * 0.85) - plan["model"]["bytes"]) // (2 * 2 * 2 * 2 * 16)


@pytest.mark.parametrize(
    ("keys", "names"),
    [
        (["--learner.proximal.kind=bypass"], set()),
        (["--learner.proximal.kind=ewma_prox"], {"average of the weights, float32", "average in the model's type"}),
        (
            ["--learner.proximal.kind=bypass", "--learner.audit.fraction=1"],
            {"weights of an old version, for the audit"},
        ),
        (["--learner.proximal.kind=interruption", "--learner.loss.kl.weight=0.1"], {"weights of version 0"}),
        (["--learner.proximal.kind=bypass", "--learner.advantages.kind=gae"], {"critic with its optimizer"}),
        (
            [
                "--learner.proximal.kind=bypass",
                "--learner.vcpo.baseline=true",
                "--learner.loss.objective=policy_gradient",
            ],
            {"gradients of the baseline, float32"},
        ),
    ],
)
def test_each_option_that_keeps_weights_is_a_cause(keys: list[str], names: set[str], run_file: Path) -> None:
    text, _ = run_command([str(run_file), "--gpus", "4x80", "--json", *keys])
    usual = {"weights", "masters, float32", "gradients, float32", "moments of AdamW, float32"}
    held = {name for name in json.loads(text)["learner"]["held"] if not name.startswith("batch:")}
    assert held - usual == names


@pytest.mark.parametrize("sharding", ["none", "full"])
def test_an_offloaded_optimizer_is_in_the_hosts_memory(sharding: str, run_file: Path) -> None:
    words = [str(run_file), "--gpus=8x80", "--json", f"--learner.sharding={sharding}", "--local.learner_ranks=4"]
    usual, offloaded = (
        json.loads(run_command([*words, f"--learner.offload={where}"])[0])["learner"] for where in ("none", "optimizer")
    )
    moved = {"masters, float32", "gradients, float32", "moments of AdamW, float32"}
    copies = {"own tensors of two versions, to encode them": 4 * (512 * 64 + 2 * 64)} if sharding == "full" else {}
    assert usual["host"] == copies
    assert moved | set(copies) < set(offloaded["host"])
    assert {name: usual["held"][name] for name in moved} == {name: offloaded["host"][name] for name in moved}
    assert set(offloaded["held"]) == set(usual["held"]) - moved
    assert "optimizer step" not in offloaded["moments"]
    assert usual["peak_bytes"] - offloaded["peak_bytes"] == sum(usual["held"][name] for name in moved)


def test_a_learner_that_does_not_fit_names_the_keys_and_what_they_bring(run_file: Path) -> None:
    text, code = run_command([str(run_file), "--gpus=2x1.001", "--model.attention=eager"])
    assert code == 1
    assert "Does not fit: a rank of the learner needs" in text
    assert "learner.activation_checkpointing, learner.groups_per_batch, learner.logprob_chunk_tokens" in text
    assert "With learner.activation_checkpointing = true: peak" in text
    assert "With learner.activation_checkpointing = true and learner.micro_batch_tokens = 64: peak" in text
    assert "The run fits." not in text


def test_too_few_gpus_are_said(run_file: Path) -> None:
    keys = (
        "--local.learner_ranks=4",
        "--rollout.engine.kind=vllm",
        "--rollout.engine.tensor_parallel=2",
        "--local.rollout_workers=2",
    )
    text, code = run_command([str(run_file), "--gpus=4x80", *keys])
    assert code == 1
    assert "the run needs 8 GPUs (4 for the engines, 4 for the ranks of the learner), and 4 are visible" in text


def test_a_single_gpu_is_shared_as_in_a_run(run_file: Path) -> None:
    words, at = [str(run_file), "--gpus=1x80", "--rollout.engine.kind=vllm"], "--rollout.engine.gpu_memory_utilization"
    text, code = run_command([*words, f"{at}=0.5"])
    assert (code, "and processes share one" in text) == (0, True)
    assert "less 1.00 for CUDA and 50% for engines" in text
    values = json.loads(run_command([*words, f"{at}=0.5", "--json"])[0])
    assert values["gpus"]["usable_bytes"] == (80 - 1 - 40) * 2**30  # less CUDA and the engine
    text, code = run_command([*words, f"{at}=0.9"])
    assert code == 1
    assert "Does not fit: GPU 0 is shared by 1 engine and the ranks of the learner" in text


def test_an_engine_that_sleeps_leaves_its_memory_to_the_learner(run_file: Path) -> None:
    at = "--rollout.engine.gpu_memory_utilization"
    words = [str(run_file), "--gpus=1x80", "--rollout.engine.kind=vllm", "--rollout.engine.sleep=true"]
    words.append("--learner.proximal.kind=interruption")
    text, code = run_command([*words, f"{at}=0.9"])
    assert (code, "less 1.00 for CUDA and 1.00 for engines that sleep" in text) == (0, True)
    values = json.loads(run_command([*words, f"{at}=0.9", "--json"])[0])
    assert values["gpus"]["usable_bytes"] == (80 - 1 - 1) * 2**30
    words[1] = "--gpus=1x1.0625"  # the learner's weights and moments have to fit beside the engine that is awake
    text, code = run_command([*words, f"{at}=0.9"])
    assert code == 1
    assert "Does not fit: what a rank of the learner holds all the time needs" in text


def test_gpus_that_the_run_lists_are_planned_as_listed(run_file: Path) -> None:
    words = [str(run_file), "--gpus=2x80", "--rollout.engine.kind=vllm", "--rollout.engine.gpu_memory_utilization=0.25"]
    both = '--local.gpus={"engines" = [1], "learner" = [1], "replicas" = []}'
    values = json.loads(run_command([*words, both, "--json"])[0])
    assert (values["fits"], values["gpus"]["usable_bytes"]) == (True, (80 - 1 - 20) * 2**30)
    apart = '--local.gpus={"engines" = [0], "learner" = [1], "replicas" = []}'
    assert json.loads(run_command([*words, apart, "--json"])[0])["gpus"]["usable_bytes"] == 79 * 2**30


def test_the_largest_moment_sets_the_peak() -> None:
    memory = Memory(
        (Cause("weights", 10), Cause("masters", 20)),
        (Moment("old log-probs", (Cause("a", 5),)), Moment("training pass", (Cause("b", 4), Cause("c", 3)))),
    )
    assert (memory.static, memory.largest.name, memory.peak) == (30, "training pass", 37)


@pytest.mark.parametrize(("width", "experts", "own"), [(2, 8, 50), (3, 8, 38), (3, 0, 34)])
def test_a_gpu_holds_whole_experts(width: int, experts: int, own: int) -> None:
    """Of 8 experts on 3 GPUs one holds 3; the model's own division by slices has no such remainder."""
    engine = VllmEngineConfig(tensor_parallel=width, expert_parallel=True)
    assert engine_memory(engine, 100, {"num_experts": experts}, Gpus(width, 80)).weights == own


def test_a_cache_without_a_known_size_of_a_token_holds_no_number() -> None:
    assert EngineMemory(weights=1, cache=100, token=0).tokens() == 0
    assert EngineMemory(weights=1, cache=-100, token=10).tokens() == 0


@pytest.mark.parametrize(
    "text", ["8", "8x", "0x80", "8x-1", "80GBx8", "", "9999999x80", "8x" + "9" * 400, "9" * 5000 + "x8"]
)
def test_gpus_of_another_form_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="is not NUMBERxGIB, for example --gpus=8x80"):
        parse(text)


def test_gpus_are_a_number_and_their_memory() -> None:
    assert parse("8x79.5") == Gpus(8, 79.5)


def test_a_run_that_its_model_refuses_is_refused(run_file: Path) -> None:
    with pytest.raises(UserError, match=r"sampling\.max_trajectory_tokens is 900000000, but the model in"):
        run_command([str(run_file), "--gpus=8x80", "--sampling.max_trajectory_tokens=900000000"])


@pytest.mark.parametrize("words", [["run.toml"], ["--gpus=8x80"], []])
def test_a_missing_argument_prints_the_usage(words: list[str]) -> None:
    with pytest.raises(UserError, match=r"usage: palimpsest plan RUN\.toml --gpus NUMBERxGIB"):
        run_command(words)
