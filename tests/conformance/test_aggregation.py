"""Aggregation of token losses (algorithms.md 10), and its independence of micro-batches and ranks (18.12)."""

import copy
from collections.abc import Callable
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from palimpsest.services.learner.losses.aggregate import Denominators, Mode, aggregate
from palimpsest.services.learner.losses.entropy import TURNS, epo_loss
from palimpsest.services.learner.losses.kl import kl_loss
from tests.conformance.test_objectives import CASES, PAIRS, inputs_of
from tests.oracles import aggregation as oracle
from tests.oracles.objectives import Data

MODES: tuple[Mode, ...] = get_args(Mode)
LENGTH = 12
Part = list[int]
"""Rows of one micro-batch."""


@pytest.mark.parametrize(
    ("mode", "value"),
    [("token_mean", 1.75), ("seq_mean_token_sum", 3.5), ("seq_mean_token_mean", 2.5), ("dr_grpo", 0.875)],
)
def test_worked_example_of_two_trajectories(mode: Mode, value: float) -> None:
    """algorithms.md 10: lengths 1 and 3, losses {4} and {1, 1, 1}, L_max = 4."""
    losses = torch.tensor([[4.0, float("nan"), 9.0], [1.0, 1.0, 1.0]])
    mask = torch.tensor([[True, False, False], [True, True, True]])
    assert float(aggregate(losses, mask, mode, Denominators.of([1, 3], 4))) == value


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_equals_the_oracle(mode: Mode) -> None:
    for seed in range(CASES):
        generator = np.random.default_rng(seed)
        shape = (int(generator.integers(1, 6)), int(generator.integers(1, LENGTH)))
        mask = generator.random(shape) < 0.6
        mask[0, 0] = True
        losses = np.where(generator.random(shape) < 0.2, 0.0, generator.normal(0, 1, shape))
        expected = oracle.aggregate([row[kept] for row, kept in zip(losses, mask, strict=True)], mode, length=LENGTH)
        denominators = Denominators.of(mask.sum(-1).tolist(), LENGTH)
        ours = aggregate(torch.tensor(losses), torch.tensor(mask), mode, denominators)
        assert float(ours) == pytest.approx(expected, rel=1e-12, abs=1e-15), f"seed {seed}"


def test_the_mean_over_trajectories_excludes_those_without_trainable_tokens() -> None:
    assert Denominators.of([2, 0, 3], 10) == Denominators(tokens=5, sequences=2, length=10)


def test_18_8_the_loss_is_zero_without_trainable_tokens() -> None:
    losses = torch.tensor([[float("nan")]], requires_grad=True)
    for mode in MODES:
        loss = aggregate(losses, torch.tensor([[False]]), mode, Denominators.of([0], LENGTH))
        assert float(loss.detach()) == 0.0
        (gradient,) = torch.autograd.grad(loss, losses)
        assert float(gradient) == 0.0


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown aggregation mode 'mean'; use one of token_mean"):
        aggregate(torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool), "mean", Denominators(1, 1, 1))  # type: ignore[arg-type]


def minibatch(seed: int) -> Data:
    """Six trajectories of a minibatch, some tokens removed; the last trajectory has no trainable token."""
    generator = np.random.default_rng(seed)
    shape = (6, LENGTH)
    behavior = -generator.exponential(1.0, shape)
    proximal = behavior + generator.normal(0, 0.2, shape)
    current = proximal + generator.normal(0, 0.2, shape)
    weight = np.where(generator.random(shape) < 0.3, 0.0, np.exp(proximal - behavior))
    mask = np.arange(LENGTH) < generator.integers(1, LENGTH + 1, (6, 1))
    mask[-1] = False
    return Data(current, proximal, behavior, weight, generator.normal(0, 1, shape), mask)


def some_rows(data: Data, rows: Part) -> Data:
    return Data(*(copy.copy(getattr(data, name)[rows]) for name in Data.__dataclass_fields__))


Share = Callable[[Data, Denominators], tuple[Tensor, Tensor]]


def summed(data: Data, parts: list[Part], share: Share) -> tuple[float, np.ndarray]:
    """Loss and gradient [rows, tokens], summed over the parts; a part holds its own rows only."""
    denominators = Denominators.of(data.mask.sum(-1).tolist(), LENGTH)
    loss, gradient = 0.0, np.zeros_like(data.current)
    for rows in parts:
        value, leaf = share(some_rows(data, rows), denominators)
        (slopes,) = torch.autograd.grad(value, leaf)
        loss += float(value.detach())
        gradient[rows] += slopes.numpy()
    return loss, gradient


SPLITS: list[list[Part]] = [[[0], [1], [2], [3], [4], [5]], [[5, 3, 0], [4, 1, 2]], [[5], [0, 1, 2, 3, 4]]]
WHOLE: list[Part] = [[0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", PAIRS)
def test_18_12_splitting_over_micro_batches_and_ranks_changes_nothing(name: str, mode: Mode) -> None:
    ours, _ = PAIRS[name]

    def share(data: Data, denominators: Denominators) -> tuple[Tensor, Tensor]:
        inputs = inputs_of(data)
        return aggregate(ours(inputs).losses, inputs.mask, mode, denominators), inputs.current

    for seed in range(20):
        data = minibatch(seed)
        loss, gradient = summed(data, WHOLE, share)
        assert np.abs(gradient).max() > 0
        for parts in SPLITS:
            split_loss, split_gradient = summed(data, parts, share)
            assert split_loss == pytest.approx(loss, rel=1e-12, abs=1e-14)
            np.testing.assert_allclose(split_gradient, gradient, rtol=1e-12, atol=1e-15)


def test_18_12_splitting_changes_neither_the_divergence_nor_the_entropy_penalty() -> None:
    def divergence(data: Data, denominators: Denominators) -> tuple[Tensor, Tensor]:
        inputs = inputs_of(data)
        losses = kl_loss(
            inputs.current, inputs.proximal, inputs.behavior, inputs.usable, estimator="k3", unbiased=True
        )  # fmt: skip
        return aggregate(losses, inputs.mask, "seq_mean_token_mean", denominators), inputs.current

    def entropy(data: Data, denominators: Denominators) -> tuple[Tensor, Tensor]:
        leaf = torch.tensor(-data.current, requires_grad=True)
        share = epo_loss(
            leaf,
            torch.tensor(data.mask),
            history=np.full(TURNS, 1.0),
            low=0.8,
            high=1.2,
            weight=0.5,
            sequences=denominators.sequences,
        )
        return share, leaf

    for share in (divergence, entropy):
        for seed in range(20):
            data = minibatch(seed)
            loss, gradient = summed(data, WHOLE, share)
            assert np.abs(gradient).max() > 0
            for parts in SPLITS:
                split_loss, split_gradient = summed(data, parts, share)
                assert split_loss == pytest.approx(loss, rel=1e-12, abs=1e-14)
                np.testing.assert_allclose(split_gradient, gradient, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("mode", MODES)
def test_18_12_removing_half_the_tokens_halves_loss_and_gradient(mode: Mode) -> None:
    mask = torch.ones(2, 4, dtype=torch.bool)
    denominators = Denominators.of([4, 4], LENGTH)
    whole, half = torch.ones(2, 4), torch.tensor([[1.0, 0.0] * 2] * 2)
    assert float(aggregate(half, mask, mode, denominators)) == pytest.approx(
        float(aggregate(whole, mask, mode, denominators)) / 2
    )


def test_the_mean_of_the_ranks_means_is_not_the_token_mean() -> None:
    """Denominators must be global: the mean of the ranks' token means is a different number."""
    losses, mask = torch.tensor([[4.0, 0.0, 0.0], [1.0, 1.0, 1.0]]), torch.tensor([[True, False, False], [True] * 3])
    apart = [
        float(aggregate(losses[i : i + 1], mask[i : i + 1], "token_mean", Denominators.of([count], 4)))
        for i, count in enumerate((1, 3))
    ]
    assert sum(apart) / 2 == 2.5
    assert float(aggregate(losses, mask, "token_mean", Denominators.of([1, 3], 4))) == 1.75
