"""Published tensors carry the checkpoint's own names, whatever form transformers keeps them in."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GlmConfig, MixtralConfig, Phi3Config, PretrainedConfig, Qwen3MoeConfig

from palimpsest.services.learner.model.weights import load_weights, named_weights, raw_tensors
from tests.learner_parts.models import load, perturb

SMALL = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "head_dim": 8}
CONFIGS = {
    "qwen3_moe": Qwen3MoeConfig(**SMALL, **MOE),
    "mixtral": MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2),
    "phi3": Phi3Config(**SMALL),
    "glm": GlmConfig(**SMALL, head_dim=8),
}


@pytest.fixture(params=CONFIGS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    config: PretrainedConfig = CONFIGS[request.param]
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    return tmp_path


def test_names_and_values_are_those_that_transformers_saves(folder: Path) -> None:
    saved = load_file(folder / "model.safetensors")
    weights = named_weights(load(folder))
    assert weights.keys() == saved.keys()
    for name, tensor in saved.items():
        assert torch.equal(weights[name], tensor), name


def test_a_version_fills_another_model(folder: Path) -> None:
    source, target = load(folder), load(folder)
    perturb(source, by=0.1, seed=1)
    load_weights(target, raw_tensors(named_weights(source)))
    for name, tensor in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], tensor), name


def test_tensors_under_the_models_own_names_are_still_accepted(folder: Path) -> None:
    source, target = load(folder), load(folder)
    perturb(source, by=0.1, seed=1)
    load_weights(target, raw_tensors(dict(source.state_dict())))
    for name, tensor in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], tensor), name


def test_a_missing_expert_is_named(folder: Path) -> None:
    weights = named_weights(load(folder))
    name = [name for name in weights if "mlp" in name or "experts" in name][-1]
    del weights[name]
    with pytest.raises(ValueError, match=f"missing tensors: {name}"):
        load_weights(load(folder), raw_tensors(weights))
