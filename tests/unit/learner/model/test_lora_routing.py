"""Replaying experts in a mixture whose attention has an adapter: the routers are frozen, and their experts given."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from palimpsest.services.learner.batch.batching import PaddedBatch, pad
from palimpsest.services.learner.model.device_batch import packed_rows
from palimpsest.services.learner.model.policy import checkpoint_activations, score_batch
from palimpsest.services.learner.model.routing import refuse_unroutable, replayed, routers_of
from tests.learner_parts.adapters import ATTENTION_LORA, adapted, own_adapter, renew
from tests.learner_parts.families import build
from tests.learner_parts.models import CPU
from tests.learner_parts.routes import routes_of
from tests.records.builders import a_row

pytestmark = pytest.mark.thorough

MIXTURES = ("Qwen2-MoE", "Qwen3-MoE", "Mixtral", "OLMoE", "GLM-4-MoE")
LENGTHS = (9, 4, 9)


@pytest.fixture(scope="module", params=MIXTURES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(request.param, tmp_path_factory.mktemp("models") / "model")


def model_of(folder: Path, *, packed: bool = False) -> torch.nn.Module:
    return adapted(folder, packed=packed, lora=ATTENTION_LORA)


def a_batch(layers: int) -> PaddedBatch:
    """Rows with experts that follow from their tokens."""
    made = []
    for i, length in enumerate(LENGTHS):
        tokens = torch.randint(3, 250, (length,), generator=torch.Generator().manual_seed(i)).tolist()
        row = a_row(f"r{i}", tokens, [-1] + [0] * (length - 1))
        made.append(replace(row, routes=routes_of(row.tokens, layers)))
    return pad(made)


@torch.no_grad()
def test_the_experts_get_the_given_ids_whatever_the_adapter_is(folder: Path) -> None:
    model = model_of(folder)
    refuse_unroutable(model)
    layers = len(routers_of(model))
    batch, seen = a_batch(layers), list[torch.Tensor]()
    free = replace(batch, routes=None)
    score_batch(model, free, CPU)  # finds the head
    for module in model.modules():
        if type(module).__name__.endswith("Experts"):
            module.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[1]))
    chosen = []
    for seed in range(2):
        renew(model, seed=seed)
        seen.clear()
        score_batch(model, free, CPU)
        chosen.append(torch.stack(seen))
        seen.clear()
        score_batch(model, batch, CPU)
        assert batch.routes is not None
        for layer, own in enumerate(seen):
            given = batch.routes[:, :, layer]
            assert np.array_equal(own.reshape(given.shape).numpy()[given >= 0], given[given >= 0])
    assert not torch.equal(*chosen), "the adapter changes the hidden states, and so what the routers would choose"


@pytest.mark.parametrize("packed", [False, True])
def test_only_the_adapter_learns_and_layers_computed_again_choose_the_same_experts(folder: Path, packed: bool) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = model_of(folder, packed=packed)
        if checkpointing:
            checkpoint_activations(model)
        batch = a_batch(len(routers_of(model)))
        values = score_batch(model, batch, CPU)
        with replayed(model, batch.routes, packed_rows(model, batch, CPU)):
            values.sum().backward()
        learns = [parameter for parameter in model.parameters() if parameter.grad is not None]
        assert len(learns) == len(own_adapter(model))
        assert not any(router.weight.requires_grad for router in routers_of(model))
        gradients.append([parameter.grad for parameter in learns])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True) if one is not None)


@torch.no_grad()
@pytest.mark.parametrize("packed", [False, True])
def test_rows_with_the_experts_of_each_other_have_other_log_probs(folder: Path, packed: bool) -> None:
    model = model_of(folder, packed=packed)
    batch = a_batch(len(routers_of(model)))
    assert batch.routes is not None
    usual = score_batch(model, batch, CPU)
    other = score_batch(model, replace(batch, routes=batch.routes[[2, 1, 0]]), CPU)
    differences = (usual - other).abs().amax(1)
    assert float(differences[0]) > 0.1
    assert float(differences[2]) > 0.1
    assert float(differences[1]) < 0.05  # rounding
