"""Replaying experts in packed rows: each row has its own, and the values of the row alone with them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from palimpsest.common.config.learner import OptimizerConfig
from palimpsest.common.versions import Version
from palimpsest.services.learner.batch.batching import FREE, PaddedBatch, Routes, Row, pad
from palimpsest.services.learner.distributed import ProcessGroup
from palimpsest.services.learner.model.device_batch import packed_rows
from palimpsest.services.learner.model.policy import checkpoint_activations, load_model, score_batch
from palimpsest.services.learner.model.routing import (
    as_routes,
    as_routes_of_packed,
    recorded,
    refuse_unroutable,
    replayed,
    routers_of,
)
from palimpsest.services.learner.model.trainable import TrainablePolicy
from tests.learner_parts.families import build
from tests.learner_parts.models import CPU, train
from tests.learner_parts.routes import WithRoutes, routes_of
from tests.records.builders import UNCORRECTED, a_learner, a_row

pytestmark = pytest.mark.thorough

MIXTURES = ("Qwen2-MoE", "Qwen3-MoE", "Mixtral", "OLMoE", "GLM-4-MoE")
"""gpt-oss has sliding windows, which packed rows refuse."""
LENGTHS = (9, 4, 9, 1, 6)
SAME = (0, 2)
"""Rows of equal length."""
TOLERANCE = 1e-4
"""Nats, in float32: other experts change log-probs by hundreds of times as much."""


def rows(layers: int) -> list[Row]:
    """Rows with experts that follow from their tokens; the router chooses at one position of each row."""
    made = []
    for i, length in enumerate(LENGTHS):
        tokens = torch.randint(3, 250, (length,), generator=torch.Generator().manual_seed(i)).tolist()
        row = a_row(f"r{i}", tokens, [-1] + [0] * (length - 1))
        routes = routes_of(row.tokens, layers)
        routes[length // 2] = FREE
        made.append(replace(row, routes=routes))
    return made


def model_of(folder: Path, layout: str) -> torch.nn.Module:
    """In float32, where the rounding of bf16 hides no difference."""
    return load_model(str(folder), CPU, "sdpa", layout=layout).float()


def experts_of(model: torch.nn.Module) -> list[Tensor]:
    """A list that grows with the ids that each layer of experts gets, [positions, experts of a token]."""
    seen: list[Tensor] = []
    for module in model.modules():
        if type(module).__name__.endswith("Experts"):
            module.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[1]))
    return seen


@pytest.fixture(scope="module", params=MIXTURES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(request.param, tmp_path_factory.mktemp("models") / "model")


@torch.no_grad()
def test_packed_rows_have_the_log_probs_of_each_row_alone_with_its_experts(folder: Path) -> None:
    packed, padded = model_of(folder, "packed"), model_of(folder, "padded")
    refuse_unroutable(packed)
    made = rows(len(routers_of(packed)))
    together = score_batch(packed, pad(made), CPU)  # finds the head
    seen, alone_seen = experts_of(packed), experts_of(padded)
    assert torch.equal(score_batch(packed, pad(made), CPU), together)
    for i, row in enumerate(made):
        score_batch(padded, pad([row]), CPU)
        del alone_seen[:]
        alone = score_batch(padded, pad([row]), CPU)
        assert torch.allclose(together[i, : len(row.tokens)], alone[0], atol=TOLERANCE)
        start = sum(LENGTHS[:i])
        for ours, expected in zip(seen, alone_seen, strict=True):
            assert torch.equal(ours[start : start + LENGTHS[i]], expected)
    routes = np.concatenate([row.routes for row in made if row.routes is not None])
    for layer, ours in enumerate(seen):
        given = torch.from_numpy(routes[:, layer]).long()
        assert torch.equal(torch.where(given < 0, ours, given), ours)


@torch.no_grad()
def test_rows_with_the_experts_of_each_other_have_other_log_probs(folder: Path) -> None:
    """What the test above would see if the order of the rows were lost."""
    packed = model_of(folder, "packed")
    made = rows(len(routers_of(packed)))
    first, second = SAME
    exchanged = list(made)
    exchanged[first] = replace(made[first], routes=made[second].routes)
    exchanged[second] = replace(made[second], routes=made[first].routes)
    usual, other = (score_batch(packed, pad(each), CPU) for each in (made, exchanged))
    for i, length in enumerate(LENGTHS):
        largest = float((usual[i] - other[i]).abs().max())
        assert largest > 100 * TOLERANCE if i in SAME else largest <= TOLERANCE, (i, length)


@torch.no_grad()
def test_a_packed_pass_records_the_experts_of_each_row_at_its_positions(folder: Path) -> None:
    packed, padded = model_of(folder, "packed"), model_of(folder, "padded")
    batch = pad([replace(row, routes=None) for row in rows(1)])
    found = recorded_of(packed, batch)
    for i, row in enumerate(batch.rows):
        with recorded(padded) as alone:
            score_batch(padded, pad([row]), CPU)
        assert np.array_equal(found[i, : LENGTHS[i]], as_routes(alone, 1)[0])
        assert (found[i, LENGTHS[i] :] == FREE).all()


def recorded_of(model: torch.nn.Module, batch: PaddedBatch) -> Routes:
    with recorded(model) as found:
        score_batch(model, batch, CPU)
    places = packed_rows(model, batch, CPU)
    assert places is not None
    return as_routes_of_packed(model, found, batch.tokens.shape, places)


def test_with_the_same_weights_nothing_changes(folder: Path) -> None:
    """Log-probs and gradients of packed rows have the same bits with and without the replay, in bf16."""
    batch = pad([replace(row, routes=None) for row in rows(1)])
    results = []
    for replay in (False, True):
        model = load_model(str(folder), CPU, "sdpa", layout="packed")
        with torch.no_grad():
            routes = recorded_of(model, batch) if replay else None
        values = score_batch(model, replace(batch, routes=routes), CPU)
        values.sum().backward()
        results.append([values, *(parameter.grad for parameter in model.parameters())])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True) if one is not None)


def test_layers_that_are_computed_again_choose_the_same_experts(folder: Path) -> None:
    """In the backward pass of the rows, which needs their places, too."""
    gradients = []
    for checkpointing in (False, True):
        model = load_model(str(folder), CPU, "sdpa", layout="packed")
        if checkpointing:
            checkpoint_activations(model)
        batch = pad(rows(len(routers_of(model))))
        values = score_batch(model, batch, CPU)
        with replayed(model, batch.routes, packed_rows(model, batch, CPU)):
            values.sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    assert len(gradients[0]) > 10
    assert all(map(torch.equal, *gradients))


def test_the_trainer_replays_the_experts_of_packed_rows_in_both_passes(tmp_path: Path) -> None:
    folder = build("Qwen3-MoE", tmp_path / "model")
    made = [replace(row, routes=None) for row in rows(1)]
    found = []
    for checkpointing in (False, True):
        model = load_model(str(folder), CPU, "sdpa", layout="packed")
        if checkpointing:
            checkpoint_activations(model)
        policy = TrainablePolicy(model, OptimizerConfig(lr=1e-3))
        config = a_learner(discrepancy=UNCORRECTED, layout="packed", activation_checkpointing=checkpointing)
        seen = experts_of(model)
        (result,) = train(policy, WithRoutes(model), ProcessGroup(), [made], Version(0), config=config).micro_batches
        layers = len(routers_of(model))
        routes = np.concatenate([routes_of(row.tokens, layers) for row in result.batch.rows])
        passes = [each for each in seen if len(each) == sum(LENGTHS)]
        assert len(passes) == (2 if checkpointing else 1) * layers
        for number, ours in enumerate(passes):
            layer = number if number < layers else 2 * layers - 1 - number  # again, from the last layer on
            assert torch.equal(ours, torch.from_numpy(routes[:, layer]).long())
        found.append([result.current, *policy.masters])
    assert all(map(torch.equal, *found))
