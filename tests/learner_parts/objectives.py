"""Objectives with their oracles, random inputs, and gradients."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from palimpsest.services.learner.losses.cispo import cispo_loss
from palimpsest.services.learner.losses.gspo import gspo_loss
from palimpsest.services.learner.losses.minirl import minirl_loss
from palimpsest.services.learner.losses.policy_gradient import policy_gradient_loss
from palimpsest.services.learner.losses.ppo_clip import ppo_loss
from palimpsest.services.learner.losses.r2vpo import r2vpo_loss
from palimpsest.services.learner.losses.types import Inputs, Outcome
from tests.oracles import objectives as oracle

CASES = 200
OFF = 1e9
"""A bound that never binds."""
Ours = Callable[[Inputs], Outcome]
Theirs = Callable[[oracle.Data], oracle.Result]
PAIRS: dict[str, tuple[Ours, Theirs]] = {
    "clipped": (
        lambda inputs: ppo_loss(inputs, clip_low=0.2, clip_high=0.28),
        lambda data: oracle.ppo(data, low=0.2, high=0.28),
    ),
    "dual_clip": (
        lambda inputs: ppo_loss(inputs, clip_low=0.1, clip_high=0.3, dual_clip=1.2),
        lambda data: oracle.ppo(data, low=0.1, high=0.3, dual=1.2),
    ),
    "policy_gradient": (policy_gradient_loss, oracle.policy_gradient),
    "gspo": (
        lambda inputs: gspo_loss(inputs, clip_low=0.05, clip_high=0.08),
        lambda data: oracle.gspo(data, low=0.05, high=0.08),
    ),
    "cispo": (
        lambda inputs: cispo_loss(inputs, clip_low=0.3, clip_high=0.2),
        lambda data: oracle.cispo(data, low=0.3, high=0.2),
    ),
    "minirl": (
        lambda inputs: minirl_loss(inputs, clip_low=0.2, clip_high=0.27),
        lambda data: oracle.minirl(data, low=0.2, high=0.27),
    ),
    "r2vpo": (
        lambda inputs: r2vpo_loss(inputs, multiplier=0.7, target=0.02),
        lambda data: oracle.r2vpo(data, multiplier=0.7, target=0.02),
    ),
}
"""Name -> our objective, the oracle's objective."""


def draw(seed: int) -> oracle.Data:
    """Random data with removed tokens, untrainable tokens and nonfinite log-probs."""
    generator = np.random.default_rng(seed)
    shape = (int(generator.integers(1, 5)), int(generator.integers(1, 9)))
    behavior = -generator.exponential(1.0, shape)
    proximal = behavior + generator.normal(0, 0.3, shape)
    current = proximal + generator.normal(0, 0.3, shape)
    for values in (behavior, proximal, current):
        values[generator.random(shape) < 0.03] = generator.choice([np.nan, np.inf, -np.inf])
    weight = np.where(generator.random(shape) < 0.2, 0.0, generator.lognormal(0, 0.3, shape))
    advantages = generator.normal(0, 1, shape)
    return oracle.Data(current, proximal, behavior, weight, advantages, generator.random(shape) < 0.8)


def inputs_of(data: oracle.Data) -> Inputs:
    return Inputs(
        current=torch.tensor(data.current, requires_grad=True),
        proximal=torch.tensor(data.proximal),
        behavior=torch.tensor(data.behavior),
        weight=torch.tensor(data.weight),
        advantages=torch.tensor(data.advantages),
        mask=torch.tensor(data.mask),
    )


def one(log_update: float, advantage: float, *, weight: float = 1.0, log_discrepancy: float = 0.0) -> Inputs:
    """A single token."""

    def number(value: float) -> Tensor:
        return torch.tensor([[value]], dtype=torch.float64)

    return Inputs(
        current=number(log_update - 1.0).requires_grad_(),
        proximal=number(-1.0),
        behavior=number(-1.0 - log_discrepancy),
        weight=number(weight),
        advantages=number(advantage),
        mask=torch.tensor([[True]]),
    )


def gradient(outcome: Outcome, inputs: Inputs) -> Tensor:
    (found,) = torch.autograd.grad(outcome.losses.sum(), inputs.current)
    return found
