"""Published tensors carry the checkpoint's own names, whatever form transformers keeps them in."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from palimpsest.services.learner.model.weights import load_weights, named_weights, raw_tensors
from tests.learner_parts.families import FAMILIES, build
from tests.learner_parts.models import load, perturb

FAST = ("Qwen3-MoE", "Mixtral", "Phi-3", "GLM-4")
"""Families that transformers keeps in another form than their checkpoints: fused experts, or fused matrices."""


@pytest.fixture(params=[pytest.param(f, marks=() if f in FAST else pytest.mark.thorough) for f in FAMILIES])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return build(request.param, tmp_path / "model")


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
    own = dict(source.state_dict())
    if source.config.tie_word_embeddings:
        del own["lm_head.weight"]  # a tied tensor is stored once
    load_weights(target, raw_tensors(own))
    for name, tensor in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], tensor), name


def test_a_missing_expert_is_named(folder: Path) -> None:
    weights = named_weights(load(folder))
    name = [name for name in weights if "mlp" in name or "experts" in name][-1]
    del weights[name]
    with pytest.raises(ValueError, match=f"missing tensors: {name}"):
        load_weights(load(folder), raw_tensors(weights))
