"""Replaying the experts of a mixture: the experts get them, and the gates come from the current router's scores."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from palimpsest.common.user_error import UserError
from palimpsest.services.learner.batch.batching import FREE, PaddedBatch, Routes, pad
from palimpsest.services.learner.model.policy import checkpoint_activations, load_model, score_batch
from palimpsest.services.learner.model.routing import (
    as_routes,
    recorded,
    refuse_unroutable,
    replayed,
    routers_of,
)
from tests.learner_parts.families import attention_of, build
from tests.learner_parts.models import CPU, perturb
from tests.records.builders import a_row

pytestmark = pytest.mark.thorough


def softmax_of_all(scores: Tensor, experts: Tensor) -> Tensor:
    chosen = scores.float().softmax(-1).gather(1, experts)
    return chosen / chosen.sum(-1, keepdim=True)


def softmax_of_chosen(scores: Tensor, experts: Tensor) -> Tensor:
    return scores.gather(1, experts).softmax(-1)


def sigmoid(scores: Tensor, experts: Tensor) -> Tensor:
    chosen = scores.sigmoid().gather(1, experts)
    return chosen / chosen.sum(-1, keepdim=True)


GATES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Qwen3-MoE": softmax_of_all, "Mixtral": softmax_of_all, "gpt-oss": softmax_of_chosen, "GLM-4-MoE": sigmoid,
}  # fmt: skip
"""Family -> gates of experts [positions, 2] from the router's scores [positions, 8], as its publication has them."""


def a_batch(routes: Routes | None = None) -> PaddedBatch:
    tokens = torch.randint(3, 250, (2, 9), generator=torch.Generator().manual_seed(1))
    rows = [a_row(f"g/{i}", tokens[i, : 9 - 2 * i].tolist(), [-1, *[0] * (8 - 2 * i)]) for i in range(2)]
    batch = pad(rows)
    return batch if routes is None else PaddedBatch(**{name: getattr(batch, name) for name in ARRAYS}, routes=routes)


ARRAYS = ("rows", "tokens", "versions", "behavior", "advantages", "temperatures", "old")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: build(family, tmp_path_factory.mktemp("models") / "model") for family in GATES}


def model_of(folders: dict[str, Path], family: str) -> torch.nn.Module:
    return load_model(str(folders[family]), CPU, attention_of(family))


@torch.no_grad()
def recorded_of(model: torch.nn.Module, batch: PaddedBatch) -> Routes:
    with recorded(model) as found:
        score_batch(model, batch, CPU)
    return as_routes(found, len(batch.rows))


@pytest.mark.parametrize("family", GATES)
def test_the_experts_get_the_recorded_ids_and_gates_from_the_present_scores(
    family: str, folders: dict[str, Path]
) -> None:
    model = model_of(folders, family)
    refuse_unroutable(model)
    routes = recorded_of(model, a_batch())
    perturb(model, by=0.1, seed=1)
    assert (recorded_of(model, a_batch()) != routes).mean() > 0.1, "the routers would choose other experts now"
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    scores: list[Tensor] = []
    for module in model.modules():
        if type(module).__name__.endswith("Experts"):
            module.register_forward_pre_hook(lambda _, arguments: seen.append(arguments))
    for router in routers_of(model):
        router.register_forward_hook(lambda _, __, output: scores.append(output[0]))
    with torch.no_grad():
        score_batch(model, a_batch(routes), CPU)
    assert len(seen) == routes.shape[2]
    for layer, (_, experts, gates) in enumerate(seen):
        assert torch.equal(experts, torch.from_numpy(routes[:, :, layer]).reshape(-1, 2).long())
        assert torch.allclose(gates.float(), GATES[family](scores[layer], experts).float(), atol=5e-3)


@pytest.mark.parametrize("family", GATES)
def test_with_the_same_weights_nothing_changes(family: str, folders: dict[str, Path]) -> None:
    """Log-probs and gradients have the same bits with and without the replay."""
    model = model_of(folders, family)
    routes = recorded_of(model, a_batch())
    results = []
    for batch in (a_batch(), a_batch(routes)):
        own = copy.deepcopy(model)
        values = score_batch(own, batch, CPU)
        values.sum().backward()
        results.append([values, *(parameter.grad for parameter in own.parameters())])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True) if one is not None)


def test_a_free_position_keeps_the_routers_choice(folders: dict[str, Path]) -> None:
    model = model_of(folders, "Qwen3-MoE")
    own = recorded_of(model, a_batch())
    others: Routes = ((own + 1) % 8).astype(np.int16)
    mixed = np.where(np.arange(9)[None, :, None, None] < 4, others, np.int16(FREE))
    seen: list[Any] = []
    for module in model.modules():
        if type(module).__name__.endswith("Experts"):
            module.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[1]))
    with torch.no_grad():
        score_batch(model, a_batch(mixed), CPU)
    first = seen[0].reshape(2, 9, 2)
    assert np.array_equal(first[:, :4], others[:, :4, 0])
    assert np.array_equal(first[:, 4:], own[:, 4:, 0])


def test_layers_that_are_computed_again_choose_the_same_experts(folders: dict[str, Path]) -> None:
    """Without the replay in the backward pass the gradients would be those of other experts."""
    plain = model_of(folders, "Qwen3-MoE")
    routes = recorded_of(plain, a_batch())
    perturb(plain, by=0.1, seed=1)
    again = copy.deepcopy(plain)
    checkpoint_activations(again)
    batch = a_batch(routes)
    for model in (plain, again):
        values = score_batch(model, batch, CPU)
        with replayed(model, routes):
            values.sum().backward()
    assert all(
        torch.equal(one.grad, other.grad)
        for one, other in zip(plain.parameters(), again.parameters(), strict=True)
        if one.grad is not None
    )


def test_a_dense_model_is_refused(starting_model: Path) -> None:
    with pytest.raises(UserError, match=r'has no experts; set learner\.routing_replay = "none"'):
        refuse_unroutable(load_model(str(starting_model), CPU, "eager"))


def test_a_family_whose_routers_choose_otherwise_is_refused() -> None:
    config = AutoConfig.for_model(
        "phimoe", vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, max_position_embeddings=64,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    with pytest.raises(UserError, match="the experts of PhimoeForCausalLM cannot be replayed"):
        refuse_unroutable(model)
