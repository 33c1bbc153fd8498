"""Without a usable token, weights, moments, schedule and steps do not change, and measures are unknown."""

import math
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from palimpsest.common.config.learner import OptimizerConfig
from palimpsest.common.metrics import REGISTRY
from palimpsest.common.versions import Version
from palimpsest.services.learner.batch.batching import PaddedBatch, Row
from palimpsest.services.learner.distributed import ProcessGroup
from palimpsest.services.learner.model.critic import Critic
from palimpsest.services.learner.model.trainable import TrainablePolicy
from palimpsest.services.learner.observability.alerts import AlertTracker
from palimpsest.services.learner.observability.prometheus_export import export_to_prometheus
from palimpsest.services.learner.observability.version_record import Batch, version_record
from palimpsest.services.learner.proximal.types import Exact
from palimpsest.services.learner.training.results import StepResult
from palimpsest.services.learner.training.state import TrainingState
from tests.learner_parts.models import CurrentModel, load, train
from tests.records.builders import a_finished, a_learner, a_row, a_segment

OPTIMIZER = OptimizerConfig(lr=1e-3, weight_decay=0.1, warmup=10)

UNBANDED = a_learner(discrepancy={"band": "off"})


class WithoutOld:
    """An exact source without an old log-prob for any token (missing = "drop")."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._source = CurrentModel(model)

    def proximal(self, batches: list[PaddedBatch], now: Version, fresh: int = 0) -> Exact:
        return Exact(self._source.proximal(batches, now).logprobs, [torch.from_numpy(batch.mask) for batch in batches])


def rows(*, trainable: bool = True) -> list[Row]:
    version = 0 if trainable else -1
    return [a_row(f"r{i}", [5, 6, 7, 8], [-1, version, version, -1], advantage=(-1.0) ** i) for i in range(4)]


def snapshot(policy: TrainablePolicy) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in policy.state().values()]


@pytest.mark.parametrize("emptied", ["no token is trainable", "all old log-probs are missing", "all tokens are masked"])
def test_a_version_without_a_usable_token_changes_neither_weights_nor_moments_nor_schedule(
    starting_model: Path, emptied: str
) -> None:
    model = load(starting_model)
    policy, critic = TrainablePolicy(model, OPTIMIZER), Critic(model, OPTIMIZER)
    sections: dict[str, Any] = {"advantages": {"kind": "gae"}, "loss": {"entropy": 0.1}, "discrepancy": {"band": "off"}}
    train(
        policy, CurrentModel(model), ProcessGroup(), [rows()], Version(0), config=a_learner(**sections), critic=critic
    )
    before, of_critic, rate = snapshot(policy), snapshot(critic.trainable), policy.learning_rate

    masked = {"discrepancy": {"band": "off", "tokens": [1e8, 1e9]}} if emptied == "all tokens are masked" else {}
    source = WithoutOld(model) if emptied == "all old log-probs are missing" else CurrentModel(model)
    batch = rows(trainable=emptied != "no token is trainable")
    config = a_learner(**(sections | masked))
    trained = train(policy, source, ProcessGroup(), [batch, batch], Version(1), config=config, critic=critic)

    for tensors, own in ((before, policy), (of_critic, critic.trainable)):
        assert all(torch.equal(a, b) for a, b in zip(tensors, own.state().values(), strict=True))
        assert own.steps == 1
        assert not any(gradient.any() for gradient in own.gradients())
    assert policy.learning_rate == rate
    assert (trained.empty, trained.skipped) == (2, 0)
    assert all(math.isnan(value) for value in (trained.loss, trained.grad_norm, trained.lr_factor))


def test_an_emptied_minibatch_leaves_the_steps_of_the_others(starting_model: Path) -> None:
    model, alone = load(starting_model), load(starting_model)
    policies = TrainablePolicy(model, OPTIMIZER), TrainablePolicy(alone, OPTIMIZER)
    empty = rows(trainable=False)
    mixed = train(policies[0], CurrentModel(model), ProcessGroup(), [rows(), empty], Version(0), config=UNBANDED)
    single = train(policies[1], CurrentModel(alone), ProcessGroup(), [rows()], Version(0), config=UNBANDED)
    assert (mixed.empty, mixed.loss, mixed.grad_norm) == (1, single.loss, single.grad_norm)
    for a, b in zip(snapshot(policies[0]), snapshot(policies[1]), strict=True):
        assert torch.equal(a, b)


@pytest.fixture(scope="module")
def unknown_line(starting_model: Path) -> dict[str, Any]:
    model = load(starting_model)
    policy = TrainablePolicy(model, OPTIMIZER)
    trained: StepResult = train(
        policy,
        WithoutOld(model),
        ProcessGroup(),
        [rows()],
        Version(0),
        config=a_learner(proximal={"kind": "snapshot", "missing": "drop"}),
    )
    records = [a_finished(0, i, segments=(a_segment(2, 4, 0),)) for i in range(4)]
    line = version_record(
        Batch(Version(0), Version(1), records, [rows()]), trained, seconds=1.0, phases={"train": 1.0},
        learning_rate=1e-3, counts={"pending": 0}, sampled_tokens=8,
    )  # fmt: skip
    return line | {"objective": "clipped"}


def test_measures_without_a_value_are_null_in_the_line(unknown_line: dict[str, Any]) -> None:
    decoded = msgspec.json.decode(msgspec.json.encode(unknown_line))
    for values in (decoded["all"], decoded["by_staleness"]["0"]):
        for name in ("log_discrepancy_abs", "discrepancy_k3", "log_staleness_ratio_abs", "difference_max", "same"):
            assert values[name] is None, name
        assert values["missing"] == 8
    assert (decoded["loss"], decoded["grad_norm"], decoded["lr_factor"]) == (None, None, None)
    assert decoded["empty_minibatches"] == 1


def test_a_history_of_entropies_without_a_version_is_unknown(starting_model: Path) -> None:
    assert math.isnan(TrainingState(CurrentModel(load(starting_model))).gauges([])["entropy_history"])


def test_unknown_measures_are_nan_in_prometheus_and_unknown_in_the_alerts(unknown_line: dict[str, Any]) -> None:
    line = dict(unknown_line)
    AlertTracker().evaluate(line)
    assert {alert["rule"] for alert in line["alerts"]} == {"fallback"}
    assert sorted(line["unknown_alerts"]) == ["clip_idle", "discrepancy_by_staleness", "discrepancy_is_one"]
    export_to_prometheus(line)
    sample = REGISTRY.get_sample_value
    assert math.isnan(sample("palimpsest_learner_log_discrepancy_abs", {"staleness": "0"}) or 0.0)
    assert math.isnan(sample("palimpsest_learner_alert", {"rule": "discrepancy_by_staleness"}) or 0.0)
    assert sample("palimpsest_learner_alert", {"rule": "fallback"}) == 1.0
    assert sample("palimpsest_learner_alert", {"rule": "mask_by_staleness"}) == 0.0
