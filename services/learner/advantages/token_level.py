"""Token-level advantages of a batch: return-to-go or GAE, whitened over all ranks. Pure."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from palimpsest.common.arrays import Float32Array
from palimpsest.services.learner.advantages.gae import generalized_advantages
from palimpsest.services.learner.advantages.reinforce import returns_to_go
from palimpsest.services.learner.advantages.trainable_tokens import Array, Floats, Mask
from palimpsest.services.learner.advantages.whiten import Moments, whitened

TOKEN_KINDS = ("reinforce_pp", "reinforce_pp_baseline", "gae")
"""Kinds with one advantage per token, computed once the batch is complete."""


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatchRewards:
    """Inputs of one micro-batch; arrays are [rows, tokens] unless stated otherwise."""

    mask: Mask
    """Trainable tokens, including masked ones: masking a token does not change the advantage of another."""
    rewards: Floats
    """[rows]: Row.advantage, the result of `group_advantages`."""
    token_rewards: Floats | None = None
    """Additional reward of each token, for example minus a KL estimate. None: no such reward."""
    values: Floats | None = None
    """Values of the critic (gae)."""
    final_values: Floats | None = None
    """[rows]: value of the state after the last token of a truncated trajectory, 0 for others (gae). None: all 0."""


@dataclass(frozen=True, slots=True, eq=False)
class Estimated:
    """Result for one micro-batch; [rows, tokens] float32, 0 where untrainable."""

    advantages: Float32Array
    """Whitened."""
    returns: Float32Array
    """In units of reward, not whitened: the return-to-go, or the target of the critic (gae)."""


def token_advantages(
    kind: str,
    parts: Sequence[MicroBatchRewards],
    *,
    gamma: float,
    lam: float,
    gather: Callable[[Moments], list[Moments]],
) -> list[Estimated]:
    """Return the advantages of a version's batch; all its minibatches are whitened together.

    kind: one of TOKEN_KINDS; parts: micro-batches of this rank; gather: returns the values of all ranks. Every rank
    calls this function. Raises ValueError for another kind, for gae without values, and as `returns_to_go` does.
    """
    if kind not in TOKEN_KINDS:
        raise ValueError(f"{kind} is not a token-level kind of advantages; use one of {', '.join(TOKEN_KINDS)}")
    estimates = [_estimates(kind, part, gamma=gamma, lam=lam) for part in parts]
    even = whitened([(raw, part.mask) for (raw, _), part in zip(estimates, parts, strict=True)], gather=gather)
    return [
        Estimated(advantages.astype(np.float32), returns.astype(np.float32))
        for advantages, (_, returns) in zip(even, estimates, strict=True)
    ]


def _estimates(kind: str, part: MicroBatchRewards, *, gamma: float, lam: float) -> tuple[Array, Array]:
    """Return the advantages before whitening, and the returns."""
    if kind != "gae":
        returns = returns_to_go(part.mask, part.rewards, gamma=gamma, token_rewards=part.token_rewards)
        return returns, returns
    if part.values is None:
        raise ValueError("gae needs the values of the critic for every micro-batch; values is None")
    advantages = generalized_advantages(
        part.mask,
        part.rewards,
        part.values,
        gamma=gamma,
        lam=lam,
        token_rewards=part.token_rewards,
        final_values=part.final_values,
    )
    return advantages, advantages + np.where(part.mask, part.values, 0.0)
