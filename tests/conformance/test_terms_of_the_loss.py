"""Terms that the configuration adds to the objective (entropy, divergence, EPO, OPSM), and state kept between versions.

algorithms.md 6 (OPSM), 8 (divergence in the reward), 9, 12 and 13.
"""

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from palimpsest.common.config.learner import LearnerConfig, OptimizerConfig
from palimpsest.common.versions import Version
from palimpsest.services.learner.batch.batching import pad
from palimpsest.services.learner.distributed import ProcessGroup
from palimpsest.services.learner.losses.aggregate import Denominators
from palimpsest.services.learner.losses.entropy import TURNS
from palimpsest.services.learner.losses.objective import Objective, Terms
from palimpsest.services.learner.losses.types import Inputs
from palimpsest.services.learner.model.trainable import TrainablePolicy
from palimpsest.services.learner.observability.token_table import flatten
from palimpsest.services.learner.proximal.surrogates.bypass import Bypass
from palimpsest.services.learner.training.preparation import prepare_batch
from palimpsest.services.learner.training.results import StepResult
from palimpsest.services.learner.training.state import TrainingState
from tests.learner_parts.models import CPU, CurrentModel, load, perturb, train
from tests.records.builders import UNCORRECTED, a_learner, a_row

CURRENT, BEHAVIOR, START, ENTROPY = (-0.9, -0.5, -2.0), (-1.2, -0.5, -1.5), (-1.0, -0.8, -1.4), (0.4, 1.0, 3.0)
"""Log-probs and entropies of the trainable tokens of two trajectories: two of the first, one of the second."""
MASK = torch.tensor([[False, True, True], [False, True, False]])
GARBAGE = 7.0


def placed(values: tuple[float, ...]) -> Tensor:
    full = torch.full(MASK.shape, GARBAGE, dtype=torch.float64)
    full[MASK] = torch.tensor(values, dtype=torch.float64)
    return full


def loss_of(history: float | None = None, **loss: object) -> tuple[float, list[float], list[float]]:
    """Loss, and its gradients with respect to the current log-probs and to the entropies of the trainable tokens.

    All advantages are 0, so the objective itself contributes nothing.
    """
    objective = Objective(a_learner(discrepancy=UNCORRECTED, loss=loss), length=3)
    current, entropy = placed(CURRENT).requires_grad_(), placed(ENTROPY).requires_grad_()
    inputs = Inputs(current, placed(BEHAVIOR), placed(BEHAVIOR), MASK.double(), 0.0 * placed(CURRENT).detach(), MASK)
    total = objective.loss(
        objective.outcome(inputs, multiplier=0.0),
        inputs,
        Terms(entropy, placed(START)),
        Denominators.of([2, 1], 3),
        history=np.full(TURNS, np.nan if history is None else history),
    )
    (total + 0.0 * (current.sum() + entropy.sum())).backward()  # type: ignore[no-untyped-call]
    assert current.grad is not None
    assert entropy.grad is not None
    for gradient in (current.grad, entropy.grad):
        assert not gradient[~MASK].any()
    return float(total.detach()), current.grad[MASK].tolist(), entropy.grad[MASK].tolist()


def test_the_entropy_bonus_is_aggregated_like_the_objective() -> None:
    total, ours, entropies = loss_of(entropy=0.3)
    assert total == pytest.approx(-0.3 * (0.4 + 1.0 + 3.0) / 3)
    assert ours == [0.0] * 3
    assert entropies == pytest.approx([-0.1] * 3)
    total, _, entropies = loss_of(entropy=0.3, aggregation="seq_mean_token_mean")
    assert total == pytest.approx(-0.3 * (0.7 + 3.0) / 2)
    assert entropies == pytest.approx([-0.075, -0.075, -0.15])


@pytest.mark.parametrize("unbiased", [True, False])
def test_the_weighted_divergence_is_added_and_pulls_towards_the_starting_model(unbiased: bool) -> None:
    total, ours, entropies = loss_of(kl={"weight": 0.6, "estimator": "k3", "unbiased": unbiased})
    apart = [c - s for c, s in zip(CURRENT, START, strict=True)]
    factor = [math.exp(c - b) if unbiased else 1.0 for c, b in zip(CURRENT, BEHAVIOR, strict=True)]
    expected = [f * (math.exp(-x) - 1 + x) for x, f in zip(apart, factor, strict=True)]
    assert total == pytest.approx(0.6 * sum(expected) / 3)
    assert ours == pytest.approx([0.6 * f * x / 3 for x, f in zip(apart, factor, strict=True)])
    assert entropies == [0.0] * 3


def test_a_masked_token_has_no_divergence() -> None:
    objective = Objective(a_learner(discrepancy=UNCORRECTED, loss={"kl": {"weight": 0.6}}), length=3)
    current, masked = placed(CURRENT).requires_grad_(), placed((1.0, 0.0, 1.0))
    inputs = Inputs(current, placed(BEHAVIOR), placed(BEHAVIOR), masked, 0.0 * placed(CURRENT), MASK)
    terms, counted = Terms(placed(ENTROPY), placed(START)), Denominators.of([2, 1], 3)
    total = objective.loss(
        objective.outcome(inputs, multiplier=0.0), inputs, terms, counted, history=np.full(TURNS, np.nan)
    )
    (found,) = torch.autograd.grad(total, current)
    assert (found[MASK] != 0).tolist() == [True, False, True]


def test_a_divergence_in_the_reward_is_not_in_the_loss() -> None:
    objective = {"kl": {"weight": 0.6, "place": "reward"}}
    config = a_learner(discrepancy=UNCORRECTED, loss=objective, advantages={"kind": "reinforce_pp"})
    inputs = Inputs(*(placed(CURRENT) for _ in range(3)), MASK.double(), 0.0 * placed(CURRENT), MASK)
    built = Objective(config, length=3)
    outcome = built.outcome(inputs, multiplier=0.0)
    terms = Terms(placed(ENTROPY), placed(START))
    assert float(built.loss(outcome, inputs, terms, Denominators.of([2, 1], 3), history=np.full(TURNS, np.nan))) == 0.0


def test_epo_penalizes_trajectories_outside_the_band_around_the_history() -> None:
    """Mean entropies 0.7 and 3 with a history of 2: the band is [1.6, 2.4]."""
    total, ours, entropies = loss_of(history=2.0, epo={"weight": 0.5})
    assert total == pytest.approx(0.5 * ((1.6 - 0.7) + (3.0 - 2.4)) / 2)
    assert ours == [0.0] * 3
    assert entropies == pytest.approx([-0.125, -0.125, 0.25])
    assert loss_of(history=None, epo={"weight": 0.5})[0] == 0.0


def test_opsm_removes_tokens_from_the_loss_but_not_from_the_denominator() -> None:
    """Both trajectories failed; the second is 0.5 nats less likely under the current policy, the first more likely."""
    objective = Objective(a_learner(discrepancy=UNCORRECTED, loss={"opsm": 0.1}), length=3)
    current = placed(CURRENT).requires_grad_()
    inputs = Inputs(current, placed(BEHAVIOR), placed(BEHAVIOR), MASK.double(), -torch.ones(2, 3).double(), MASK)
    outcome = objective.outcome(inputs, multiplier=0.0)
    assert outcome.clipped["opsm"][MASK].tolist() == [False, False, True]
    terms = Terms(placed(ENTROPY), None)
    total = objective.loss(outcome, inputs, terms, Denominators.of([2, 1], 3), history=np.full(TURNS, np.nan))
    assert float(total.detach()) == pytest.approx((math.exp(0.3) + 1.0) / 3)


class Constant(torch.nn.Module):
    """A model with the same distribution at every place."""

    def __init__(self, probabilities: list[float]) -> None:
        super().__init__()
        self.logits = torch.tensor(probabilities).log()

    def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits.expand(*input_ids.shape, -1))


def test_a_divergence_in_the_reward_lowers_the_returns() -> None:
    """Return of a token: the reward minus weight x the sum of log(mu / start) over it and all later tokens."""
    config = a_learner(
        loss={"kl": {"weight": 0.1, "estimator": "k1", "place": "reward"}}, advantages={"kind": "reinforce_pp"}
    )
    batch = pad([a_row("a", [0, 1, 2, 1], [-1, 3, -1, 3], behavior=[0.0, -0.3, 0.0, -2.0], advantage=0.8)])
    state = TrainingState(Bypass(CPU), start=Constant([0.5, 0.3, 0.2]))
    prepared = prepare_batch(state, [batch], config, ProcessGroup(), CPU)
    (returns,), (advantages,) = prepared.returns, prepared.advantages
    paid = [-0.3 - math.log(0.3), -2.0 - math.log(0.3)]
    expected = [0.8 - 0.1 * (paid[0] + paid[1]), 0.8 - 0.1 * paid[1]]
    assert returns[0].tolist() == pytest.approx([0.0, expected[0], 0.0, expected[1]])
    away = math.copysign(1.0, expected[0] - expected[1])
    assert advantages[0].tolist() == pytest.approx([0.0, away / math.sqrt(2), 0.0, -away / math.sqrt(2)], rel=1e-3)


def trained(folder: Path, config: LearnerConfig) -> StepResult:
    """Result of training on two minibatches that older weights sampled."""
    model, older = load(folder).float(), load(folder).float()
    perturb(older, by=0.02, seed=5)
    generator = torch.Generator().manual_seed(1)
    rows = [
        a_row(f"r{i}", torch.randint(3, 250, (7,), generator=generator).tolist(), [-1, -1, 0, 0, -1, 1, 1])
        for i in range(4)
    ]
    policy = TrainablePolicy(model, OptimizerConfig(lr=1e-3))
    return train(
        policy, CurrentModel(older), ProcessGroup(), [rows[:2], rows[2:]], Version(2), config=config, multiplier=0.5
    )


def test_the_multiplier_of_r2vpo_follows_the_mean_square_over_a_version(starting_model: Path) -> None:
    config = a_learner(
        discrepancy=UNCORRECTED, loss={"objective": "r2vpo", "r2vpo": {"rate": 2.0, "target": 0.001}}
    )  # fmt: skip
    result = trained(starting_model, config)
    tokens = [flatten(scored, Version(2)) for scored in result.micro_batches]
    ratios = np.concatenate([np.exp(part.current.astype(np.float64) - part.proximal) for part in tokens])
    mean = float(((ratios - 1) ** 2).mean())
    assert mean > 0.01
    assert result.gauges["multiplier"] == pytest.approx(0.5 + 2.0 * (mean - 0.001), rel=1e-4)


def test_normalized_weights_have_mean_1_over_each_minibatch(starting_model: Path) -> None:
    """Two minibatches of two micro-batches each."""
    discrepancy = {"band": "off", "weight": "truncated", "weight_normalize": True}
    result = trained(starting_model, a_learner(discrepancy=discrepancy, micro_batch_tokens=7))
    assert len(result.micro_batches) == 4
    means = []
    for first in (True, False):
        parts = [scored for scored in result.micro_batches if scored.first is first]
        kept = torch.cat([part.correction.weight[torch.from_numpy(part.batch.mask)] for part in parts])
        assert float(kept.mean()) == pytest.approx(1.0, rel=1e-5)
        means += [float(part.correction.weight[torch.from_numpy(part.batch.mask)].mean()) for part in parts]
    assert max(abs(mean - 1.0) for mean in means) > 1e-3
    assert result.normalizer != 1.0


def test_the_history_of_epo_gets_the_mean_over_trajectories_once_per_version(starting_model: Path) -> None:
    result = trained(starting_model, a_learner(discrepancy=UNCORRECTED))
    means = [
        float(row[sampled].mean())
        for scored in result.micro_batches
        for row, sampled in zip(scored.entropy, torch.from_numpy(scored.batch.mask), strict=True)
    ]
    assert len(means) == 4
    assert result.gauges["entropy_history"] == pytest.approx(sum(means) / 4, rel=1e-5)


def test_the_divergence_in_the_loss_is_reported(starting_model: Path) -> None:
    """kl_start is the mean of k2 over the tokens of the loss: (log current - log start)^2 / 2."""
    model, start = load(starting_model), load(starting_model)
    perturb(start, by=0.02, seed=3)
    policy = TrainablePolicy(model, OptimizerConfig())
    rows = [a_row(f"r{i}", [5, 6, 7 + i, 8], [-1, 0, 0, 0], behavior=[-3.0] * 4) for i in range(3)]
    config = a_learner(discrepancy=UNCORRECTED, loss={"kl": {"weight": 0.1, "unbiased": False}})
    source, other = CurrentModel(model), CurrentModel(start)
    batch = pad(rows)
    (current,), (reference,) = (one.proximal([batch], Version(0)).logprobs for one in (source, other))
    mask = torch.from_numpy(batch.mask)
    expected = float(((current - reference)[mask].double() ** 2 / 2).mean())
    result = train(policy, source, ProcessGroup(), [rows], Version(0), config=config, start=start)
    assert result.gauges["kl_start"] == pytest.approx(expected, rel=1e-4)
    without = a_learner(discrepancy=UNCORRECTED)
    assert "kl_start" not in train(policy, source, ProcessGroup(), [rows], Version(0), config=without).gauges
