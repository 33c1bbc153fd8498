"""The plans of examples/qwen3_*.toml: they fit the machine that the files name, and are those of docs/memory.md."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from transformers import PretrainedConfig, Qwen3Config, Qwen3MoeConfig

from palimpsest.common.config import load
from palimpsest.plan import command
from palimpsest.plan.causes import GIB
from palimpsest.plan.gpus import parse
from palimpsest.plan.plan import Plan
from palimpsest.plan.rehearsal import PassShape, Rehearsed, rehearse
from tests.runs.run_process import ROOT

COMMON: dict[str, Any] = {
    "num_attention_heads": 32, "head_dim": 128, "max_position_embeddings": 40960,
    "dtype": "bfloat16",
}  # fmt: skip


def shape(example: str, *, layers: int | None = None, vocabulary: int = 151936) -> PretrainedConfig:
    """Return the shape of the published model, or a smaller one."""
    if example == "qwen3_4b":
        return Qwen3Config(
            **COMMON, vocab_size=vocabulary, hidden_size=2560, intermediate_size=9728, num_hidden_layers=layers or 36,
            num_key_value_heads=8, tie_word_embeddings=True, architectures=["Qwen3ForCausalLM"],
        )  # fmt: skip
    return Qwen3MoeConfig(
        **COMMON, vocab_size=vocabulary, hidden_size=2048, intermediate_size=6144, num_hidden_layers=layers or 48,
        num_key_value_heads=4, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768, norm_topk_prob=True,
        tie_word_embeddings=False, architectures=["Qwen3MoeForCausalLM"],
    )  # fmt: skip


EXAMPLES = ("qwen3_4b", "qwen3_30b_a3b")
TURNS = {
    "local.rollout_workers": "1", "local.learner_ranks": "1", "rollout.engine.tensor_parallel": "1",
    "rollout.engine.sleep": "true", "learner.proximal.kind": "interruption", "learner.publishing": "inline",
}  # fmt: skip
ADAPTER = {
    "learner.lora.rank": "32", "learner.lora.targets": '["q_proj","k_proj","v_proj","o_proj"]',
    "learner.offload": "none",
}  # fmt: skip
USED = "rollout.engine.gpu_memory_utilization"
WHOLE, ON_GPU, ON_HOST = ({f"learner.{key}": value} for key, value in
                          (("sharding", "none"), ("offload", "none"), ("offload", "optimizer")))  # fmt: skip
ROWS: list[tuple[str, int, dict[str, str]]] = [
    ("qwen3_4b", 8, {}),
    ("qwen3_4b", 8, {"learner.activation_checkpointing": "false"}),
    ("qwen3_4b", 8, WHOLE),
    ("qwen3_4b", 8, WHOLE | ON_HOST),
    ("qwen3_4b", 8, {"learner.context_parallel": "2"}),
    ("qwen3_4b", 16, {"local.rollout_workers": "8", "local.learner_ranks": "8"}),
    ("qwen3_4b", 1, TURNS | WHOLE | ON_HOST | {USED: "0.7"}),
    ("qwen3_4b", 1, TURNS | WHOLE | ADAPTER | {USED: "0.7"}),
    ("qwen3_30b_a3b", 8, {}),
    ("qwen3_30b_a3b", 8, ON_GPU),
    ("qwen3_30b_a3b", 8, ADAPTER | {"rollout.engine.tensor_parallel": "1", "local.rollout_workers": "4"}),
    ("qwen3_30b_a3b", 16, ON_GPU | {"local.rollout_workers": "4", "local.learner_ranks": "8"}),
    ("qwen3_30b_a3b", 16, ON_GPU | {"local.learner_ranks": "12"}),
    ("qwen3_30b_a3b", 32, ON_GPU | {"local.rollout_workers": "8", "local.learner_ranks": "16"}),
    ("qwen3_30b_a3b", 1, TURNS | {USED: "0.85"}),
]
"""The rows of both tables of docs/memory.md: example, GPUs, changed keys."""


def planned(example: str, gpus: int, keys: dict[str, str], model: Path) -> Plan:
    """Return the plan of an example with the model in a folder."""
    flags = [f"--{key}={value}" for key, value in {"model.path": str(model), **keys}.items()]
    config = load([str(ROOT / "examples" / f"{example}.toml"), *flags], {}, program="test").config
    return command.make_plan(config, parse(f"{gpus}x80"))


@pytest.mark.thorough
@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_of_this_scale_can_be_planned(example: str, tmp_path: Path) -> None:
    """With a part of the model, because a complete one takes half a minute."""
    shape(example, layers=2, vocabulary=512).save_pretrained(tmp_path)
    plan = planned(example, 8, {}, tmp_path)
    assert plan.fits, plan.misfits()
    assert (plan.shape.tokens, plan.shape.packed, plan.shape.activation_checkpointing) == (32768, True, 1)
    assert plan.needed.number == 8


@pytest.mark.long
def test_the_tables_of_the_documentation_are_the_plans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in EXAMPLES:
        shape(name).save_pretrained(tmp_path / name)

    @cache
    def rehearsed(path: str, shape: PassShape) -> Rehearsed:
        return rehearse(path, shape)

    monkeypatch.setattr(command, "rehearse", rehearsed)
    monkeypatch.setattr(command, "_remedies", lambda *_: ())
    page = (ROOT / "docs" / "memory.md").read_text().partition("## At the scale of the paper")[2]
    written = [line for line in page.splitlines() if line.endswith(("fits |", "not fit |"))]
    assert len(written) == len(ROWS)
    for line, (example, gpus, keys) in zip(written, ROWS, strict=True):
        plan = planned(example, gpus, keys, tmp_path / example)
        assert plan.engine is not None
        memory, training = plan.learner, plan.learner.moments[1]
        host = sum(cause.size for cause in memory.host)
        numbers = [f"{size / GIB:.1f}" for size in (memory.static, training.size, memory.peak)]
        numbers += [f"{host / GIB:.0f}", f"{plan.engine.tokens():,}", "fits" if plan.fits else "does not fit"]
        assert line.startswith(f"| {gpus} |")
        assert line.split(" | ")[3:] == [*numbers[:-1], f"{numbers[-1]} |"], (example, keys)
