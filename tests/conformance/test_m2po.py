"""M2PO as published: harmful tokens, tau by the second-moment budget, and the clip that follows from it."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from palimpsest.services.learner.losses.m2po import harmful_squares, m2po_loss, m2po_tau
from palimpsest.services.learner.losses.types import Inputs
from tests.learner_parts.corrections import alone_on_its_machine, on_ranks
from tests.oracles import m2po as oracle

CASES = 200


def inputs_of(deltas: list[float], advantages: list[float]) -> Inputs:
    current = torch.tensor([deltas], dtype=torch.float64).requires_grad_()
    flat = torch.zeros(1, len(deltas), dtype=torch.float64)
    mask = torch.ones(1, len(deltas), dtype=torch.bool)
    return Inputs(current, flat - 7.0, flat, flat + 1.0, torch.tensor([advantages], dtype=torch.float64), mask)


def tau_of(deltas: list[float], advantages: list[float], budget: float) -> float:
    return m2po_tau(harmful_squares(inputs_of(deltas, advantages)), budget, gather=alone_on_its_machine)


@pytest.mark.parametrize(
    ("deltas", "advantages", "budget", "tau"),
    [
        ([0.1, 0.2, 0.3], [1.0, 1.0, 1.0], 0.04, 0.2),  # 0.2: .01 + .04 + .04 <= .12; 0.3: .01 + .04 + .09 > .12
        ([0.1, 0.2, 0.3], [1.0, 1.0, 1.0], 0.05, 0.3),  # .14 <= .15
        ([0.1, 0.2, 0.3], [1.0, 1.0, -1.0], 0.04, 0.2),  # the third is not harmful: .05 <= .08
        ([-0.1, -0.2, 0.9], [-1.0, -1.0, -1.0], 0.04, 0.2),
        ([0.5, 0.6], [1.0, 1.0], 0.04, 0.0),  # 2 * .25 > .08: no harmful token fits
        ([0.5, 0.6], [-1.0, 0.0], 0.04, 0.0),  # no harmful token
        ([], [], 0.04, 0.0),
    ],
)
def test_tau_by_hand(deltas: list[float], advantages: list[float], budget: float, tau: float) -> None:
    assert tau_of(deltas, advantages, budget) == pytest.approx(tau)


def test_tau_equals_the_oracle_for_any_split_over_ranks() -> None:
    seen = {"all": 0, "some": 0, "none": 0}
    for seed in range(CASES):
        generator = np.random.default_rng(seed)
        count = int(generator.integers(1, 40))
        deltas, advantages = generator.normal(0, 0.3, count), generator.choice([-1.0, 0.0, 0.5, 2.0], count)
        budget = float(generator.choice([0.005, 0.04, 0.2]))
        expected = oracle.tau(deltas, advantages, budget)
        squares = harmful_squares(inputs_of(deltas.tolist(), advantages.tolist()))
        got = on_ranks(3, lambda rank, gather, s=squares, b=budget: m2po_tau(s[rank::3], b, gather=gather))  # type: ignore[misc, return-value, arg-type]
        assert got == [got[0]] * 3
        assert got[0] == pytest.approx(expected, rel=1e-12), f"seed {seed}"
        if len(squares):
            seen["none" if not expected else "all" if expected == math.sqrt(float(squares.max())) else "some"] += 1
    assert min(seen.values()) >= 5, seen


def test_loss_and_gradient_equal_the_oracle() -> None:
    for seed in range(CASES):
        generator = np.random.default_rng(seed)
        deltas, advantages = generator.normal(0, 0.6, 12), generator.choice([-1.5, 0.0, 1.0], 12)
        width = float(generator.uniform(0, 1))
        inputs = inputs_of(deltas.tolist(), advantages.tolist())
        outcome = m2po_loss(inputs, tau=width, clip_low=0.3, clip_high=0.5)
        (gradient,) = torch.autograd.grad(outcome.losses.sum(), inputs.current)
        for t in range(12):
            loss, slope = oracle.loss_and_slope(deltas[t], advantages[t], width)
            assert float(outcome.losses[0, t].detach()) == pytest.approx(loss, rel=1e-9, abs=1e-12)
            assert float(gradient[0, t]) == pytest.approx(slope, rel=1e-9, abs=1e-12)


def test_a_kept_token_has_the_gradient_of_its_ratio_times_the_advantage() -> None:
    """Ratios 1.105, 0.905 and 0.741 with A = 1: the published weights, where a mask alone would give 1."""
    inputs = inputs_of([0.1, -0.1, -0.3], [1.0, 1.0, 1.0])
    outcome = m2po_loss(inputs, tau=0.0, clip_low=0.3, clip_high=0.5)
    (gradient,) = torch.autograd.grad(outcome.losses.sum(), inputs.current)
    assert gradient[0].tolist() == pytest.approx([-1.10517, -0.90484, -0.74082], abs=1e-5)


def test_the_clip_is_never_narrower_than_its_least_width_and_includes_tau() -> None:
    inputs = inputs_of([math.log(1.49), math.log(1.51), math.log(0.71), math.log(0.69)], [1.0, 1.0, -1.0, -1.0])
    narrow = m2po_loss(inputs, tau=0.01, clip_low=0.3, clip_high=0.5)
    assert narrow.clipped["clip_high"].tolist() == [[False, True, False, False]]
    assert narrow.clipped["clip_low"].tolist() == [[False, False, False, True]]
    wide = m2po_loss(inputs, tau=math.log(1.51), clip_low=0.3, clip_high=0.5)
    assert not wide.clipped["clip_high"].any()  # the token that defines tau is kept
    assert not wide.clipped["clip_low"].any()


def test_removed_and_nonfinite_tokens_do_not_count() -> None:
    inputs = inputs_of([0.1, 5.0, 6.0], [1.0, 1.0, 1.0])
    inputs.weight[0, 1] = 0.0
    broken = replace(inputs, behavior=torch.tensor([[0.0, 0.0, float("nan")]], dtype=torch.float64))
    assert harmful_squares(broken).tolist() == pytest.approx([0.01])
    outcome = m2po_loss(broken, tau=0.1, clip_low=0.3, clip_high=0.5)
    assert outcome.losses[0, 1:].tolist() == [0.0, 0.0]
