"""An advantage for each token of a batch: return-to-go or GAE, whitened over all ranks. Pure."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from palimpsest.common.arrays import Float32Array
from palimpsest.services.learner.advantages.gae import generalized_advantages
from palimpsest.services.learner.advantages.reinforce import returns_to_go
from palimpsest.services.learner.advantages.trainable_tokens import Array, Floats, Mask
from palimpsest.services.learner.advantages.whiten import Moments, whitened

TOKEN_KINDS = ("reinforce_pp", "reinforce_pp_baseline", "gae")
"""Kinds whose advantages differ from token to token, so that they cannot be made before the batch is there."""


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatchRewards:
    """What one micro-batch brings along; arrays are [rows, tokens] where not said otherwise."""

    mask: Mask
    """Trainable tokens, before any is masked: a removed token changes no other's advantage."""
    rewards: Floats
    """[rows]: what `group_advantages` made of the rewards (Row.advantage)."""
    token_rewards: Floats | None = None
    """Each token's own reward besides, for example minus a KL estimate. None: there is none."""
    values: Floats | None = None
    """The critic's (gae)."""


@dataclass(frozen=True, slots=True, eq=False)
class Estimated:
    """Of one micro-batch; [rows, tokens] float32, 0 where untrainable."""

    advantages: Float32Array
    """Whitened."""
    returns: Float32Array
    """In units of reward, not whitened: the return-to-go, or what the critic should have said (gae)."""


def token_advantages(
    kind: str,
    parts: Sequence[MicroBatchRewards],
    *,
    gamma: float,
    lam: float,
    gather: Callable[[Moments], list[Moments]],
) -> list[Estimated]:
    """Advantages of the whole batch of a version: all its minibatches, whitened together.

    kind: one of TOKEN_KINDS; parts: this rank's, in whatever order; gather: every rank's value (`ProcessGroup.gather`);
    every rank calls this. Raises ValueError for another kind, for gae without values, and as `returns_to_go` does.
    """
    if kind not in TOKEN_KINDS:
        raise ValueError(f"{kind} gives no advantages to tokens: take one of {', '.join(TOKEN_KINDS)}")
    estimates = [_estimates(kind, part, gamma=gamma, lam=lam) for part in parts]
    even = whitened([(raw, part.mask) for (raw, _), part in zip(estimates, parts, strict=True)], gather=gather)
    return [
        Estimated(advantages.astype(np.float32), returns.astype(np.float32))
        for advantages, (_, returns) in zip(even, estimates, strict=True)
    ]


def _estimates(kind: str, part: MicroBatchRewards, *, gamma: float, lam: float) -> tuple[Array, Array]:
    """Advantages before whitening, and returns."""
    if kind != "gae":
        returns = returns_to_go(part.mask, part.rewards, gamma=gamma, token_rewards=part.token_rewards)
        return returns, returns
    if part.values is None:
        raise ValueError("gae needs the critic's values of every part: there are none")
    advantages = generalized_advantages(
        part.mask,
        part.rewards,
        part.values,
        gamma=gamma,
        lam=lam,
        token_rewards=part.token_rewards,
    )
    return advantages, advantages + np.where(part.mask, part.values, 0.0)
