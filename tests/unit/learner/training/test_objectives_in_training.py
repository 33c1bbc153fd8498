"""Every recipe trains a version of the small real model, and the gradient without thresholds ignores the proximal."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from palimpsest.common.config.learner import LearnerConfig, OptimizerConfig
from palimpsest.common.config.recipes import RECIPES, apply_recipe
from palimpsest.common.versions import Version
from palimpsest.services.learner.batch.batching import PaddedBatch, Row
from palimpsest.services.learner.distributed import ProcessGroup
from palimpsest.services.learner.model.critic import Critic
from palimpsest.services.learner.model.trainable import TrainablePolicy
from palimpsest.services.learner.observability.token_table import flatten
from palimpsest.services.learner.proximal.surrogates.factory import build_surrogate
from palimpsest.services.learner.proximal.types import Exact, Source
from palimpsest.services.learner.training.results import StepResult
from palimpsest.services.learner.training.state import TrainingState
from tests.learner_parts.models import CPU, CurrentModel, load, logprobs, perturb, train
from tests.records.builders import UNCORRECTED, a_learner, a_row

pytestmark = pytest.mark.thorough

NOW = Version(4)


def rows(model: torch.nn.Module) -> list[Row]:
    """Rows of two turns with a tool's answer between them, of versions 1 to 4, with a small engine error."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for i in range(8):
        length = 9 + i % 4
        tokens = torch.randint(3, 250, (length,), generator=generator).tolist()
        versions = [-1, -1, 1 + i % 4, 1 + i % 4, -1, -1] + [4] * (length - 6)
        own = [0.0, *logprobs(model, tokens)]
        noise = (0.1 * torch.randn(length, generator=generator)).tolist()
        behavior = [min(0.0, a + b) for a, b in zip(own, noise, strict=True)]
        made.append(a_row(f"g{i // 4}/{i % 4}", tokens, versions, behavior=behavior, advantage=(-1.0) ** i))
    return made


class OtherModel:
    """An exact source whose old policy of every version is another model."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._current_model = CurrentModel(model)

    def proximal(self, batches: Sequence[PaddedBatch], now: Version, fresh: int = 0) -> Exact:
        found = self._current_model.proximal(batches, now)
        masks = [torch.from_numpy(batch.mask) for batch in batches]
        zero = torch.zeros(())
        return Exact([torch.where(mask, values, zero) for mask, values in zip(masks, found.logprobs, strict=True)])


def trained(
    folder: Path, config: LearnerConfig, source: str | Source = "", **state: Any
) -> tuple[StepResult, TrainablePolicy]:
    model = load(folder).float()
    policy = TrainablePolicy(model, OptimizerConfig(lr=1e-3))
    older = load(folder).float()
    perturb(older, by=0.02, seed=5)
    if not isinstance(source, str):
        made = source
    elif config.proximal.kind == "snapshot":
        made = OtherModel(older)
    else:
        made = build_surrogate(config.proximal, model=model, masters=policy.masters, device=CPU, max_staleness=4)
    if config.advantages.kind == "gae":
        state["critic"] = Critic(model, OptimizerConfig(lr=1e-3))
    if config.loss.kl.weight:
        state["start"] = older
    all_rows = rows(model)
    batches = [all_rows[:4], all_rows[4:]]
    return train(policy, made, ProcessGroup(), batches, NOW, config=config, multiplier=1.0, **state), policy


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_trains_a_version(name: str, starting_model: Path) -> None:
    config = a_learner(**apply_recipe(name, {}))
    result, policy = trained(starting_model, config)
    assert result.skipped == 0
    assert policy.steps == 2 - result.empty  # a recipe may mask all tokens of a minibatch
    assert (result.loss == result.loss) is (result.empty < 2)
    assert result.exact is (config.proximal.kind == "snapshot")
    assert 0 <= result.active_share <= 1
    tokens = [flatten(scored, NOW) for scored in result.micro_batches]
    assert sum(len(part.staleness) for part in tokens) == sum(row.trainable for row in rows(load(starting_model)))
    for part in tokens:
        touched = part.masked | part.clipped
        by_cause = sum(part.causes.values(), start=0 * part.masked.astype(int))
        assert ((by_cause > 0) == touched).all()


SURROGATES = (
    "bypass", "current_recompute", "interp_prox_loglinear", "linear_prox", "ewma_prox", "ppo_ewma_async",
)  # fmt: skip


def gradients(folder: Path, kind: str, seed: int) -> list[Tensor]:
    """Gradients of the first minibatch without thresholds, on a model that moved after the surrogate was built."""
    config = a_learner(
        proximal={"kind": kind},
        discrepancy=UNCORRECTED.model_copy(update={"weight": "ratio"}),
        loss={"objective": "policy_gradient"},
    )
    model = load(folder).float()
    policy = TrainablePolicy(model, OptimizerConfig())
    older = load(folder).float()
    perturb(older, by=0.05, seed=seed)
    source: Source = (
        OtherModel(older)
        if kind == "snapshot"
        else build_surrogate(config.proximal, model=model, masters=policy.masters, device=CPU, max_staleness=4)
    )
    taken: list[Tensor] = []
    policy.step = lambda **_: taken.extend(g.clone() for g in policy.gradients()) or 1.0  # type: ignore[method-assign]
    train(policy, source, ProcessGroup(), [rows(model)], NOW, config=config)
    return taken[: len(policy.masters)]


@pytest.mark.parametrize("kind", SURROGATES)
def test_18_1_with_all_thresholds_off_every_proximal_gives_the_same_gradient(kind: str, starting_model: Path) -> None:
    """The proximal changes only the ratios that the constraints see."""
    exact = gradients(starting_model, "snapshot", seed=3)
    size = max(float(gradient.abs().max()) for gradient in exact)
    assert size > 1e-3
    for ours, theirs in zip(exact, gradients(starting_model, kind, seed=3), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-5 * size)


def test_18_14_a_scaled_step_restores_the_learning_rate(starting_model: Path) -> None:
    config = a_learner(vcpo={"lr_scaling": "linear"}, proximal={"kind": "bypass"}, discrepancy=UNCORRECTED)
    result, policy = trained(starting_model, config)
    assert 0 < result.lr_factor < 1
    assert policy.learning_rate == OptimizerConfig(lr=1e-3).lr
    policy.step()
    assert policy.optimizer.param_groups[0]["lr"] == 1e-3


def test_vcpo_subtracts_its_baseline_from_every_reward(starting_model: Path) -> None:
    """Equal rewards give a zero gradient, because the baseline equals the reward."""
    config = a_learner(
        vcpo={"baseline": True},
        loss={"objective": "policy_gradient"},
        proximal={"kind": "bypass"},
        discrepancy=UNCORRECTED,
    )
    model = load(starting_model).float()
    policy = TrainablePolicy(model, OptimizerConfig())
    even = [a_row(r.trajectory, r.tokens.tolist(), r.versions.tolist(), reward=0.7) for r in rows(model)]
    result = train(policy, CurrentModel(model), ProcessGroup(), [even], NOW, config=config)
    assert result.baseline == pytest.approx(0.7)
    assert result.grad_norm == pytest.approx(0.0, abs=1e-5)


def test_vcpo_reports_the_rewards_minus_the_baseline_of_the_group_as_advantages(starting_model: Path) -> None:
    config = a_learner(
        vcpo={"baseline": True},
        loss={"objective": "policy_gradient"},
        proximal={"kind": "bypass"},
        discrepancy=UNCORRECTED,
    )
    model = load(starting_model).float()
    policy = TrainablePolicy(model, OptimizerConfig())
    grouped = [
        dataclasses.replace(row, group=f"g{i // 4}", reward=float(i % 2 if i < 4 else 1))
        for i, row in enumerate(rows(model))
    ]
    result = train(policy, CurrentModel(model), ProcessGroup(), [grouped], NOW, config=config)
    found = {one.batch.rows[0].trajectory: flatten(one, NOW).advantages.tolist() for one in result.micro_batches}
    assert len(found) == 8
    for i, row in enumerate(grouped):
        advantages = found[row.trajectory]
        assert len(set(advantages)) == 1
        if i >= 4:  # equal rewards: the baseline of the group equals them
            assert advantages[0] == pytest.approx(0.0, abs=1e-6)
    between = {found[row.trajectory][0] for row in grouped[:4]}
    assert {round(value + (1 - max(between)), 6) for value in between} == {0.0, 1.0}


def test_m2po_trains_and_reports_its_tau(starting_model: Path) -> None:
    config = a_learner(**apply_recipe("m2po", {}))
    result, _ = trained(starting_model, config)
    assert result.gauges["m2po_tau"] >= 0.0
    assert {"clip_high", "clip_low", "ratio_bound"} == result.micro_batches[0].clipped.keys()


def test_a_checkpoint_without_the_entropies_of_turns_can_be_restored(starting_model: Path) -> None:
    state = TrainingState(CurrentModel(load(starting_model)), multiplier=0.5)
    state.entropies.add(1.5)
    older = {name: tensor for name, tensor in state.state().items() if not name.endswith("entropy_turns")}
    restored = TrainingState(CurrentModel(load(starting_model)))
    restored.restore(older)
    assert (restored.multiplier, restored.entropies.mean) == (0.5, 1.5)


def test_training_state_is_restored_exactly_from_a_checkpoint(starting_model: Path) -> None:
    config = a_learner(
        proximal={"kind": "ppo_ewma_async"},
        advantages={"kind": "gae"},
        loss={"r2vpo": {"rate": 0.5}, "epo": {"weight": 0.1}},
    )
    model = load(starting_model).float()
    policy = TrainablePolicy(model, OptimizerConfig(lr=1e-3))

    def made() -> TrainingState:
        source = build_surrogate(config.proximal, model=model, masters=policy.masters, device=CPU, max_staleness=4)
        return TrainingState(source, critic=Critic(model, OptimizerConfig(lr=1e-3)), multiplier=1.0)

    first = made()
    train(policy, first.source, ProcessGroup(), [rows(model)], NOW, config=config, critic=first.critic)
    first.multiplier = 0.25
    first.entropies.add(1.5)
    second = made()
    second.restore({name: tensor.clone() for name, tensor in first.state().items()})
    for name, tensor in first.state().items():
        assert torch.allclose(tensor, second.state()[name], rtol=0, atol=0, equal_nan=True), name


def test_audited_batches_have_proximal_and_old_log_probs(starting_model: Path) -> None:
    older = load(starting_model).float()
    perturb(older, by=0.02, seed=5)
    config = a_learner(proximal={"kind": "current_recompute"}, audit={"fraction": 1.0})
    result, _ = trained(starting_model, config, auditor=OtherModel(older))
    for scored in result.micro_batches:
        tokens = flatten(scored, NOW)
        assert (tokens.old == tokens.old).all()
        assert (tokens.old != tokens.proximal).any()
    unaudited, _ = trained(
        starting_model, config.model_copy(update={"audit": a_learner().audit}), auditor=OtherModel(older)
    )
    assert all((flatten(scored, NOW).old != flatten(scored, NOW).old).all() for scored in unaudited.micro_batches)
