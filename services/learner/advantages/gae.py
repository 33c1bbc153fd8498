"""Generalized advantage estimation over trainable tokens. Pure; docs/algorithms/gae.md."""

import numpy as np

from palimpsest.services.learner.advantages.trainable_tokens import (
    Array,
    Floats,
    Mask,
    check_share,
    discounted_sums,
    pack,
    packed_rewards,
    unpack,
)


def generalized_advantages(
    mask: Mask,
    rewards: Floats,
    values: Floats,
    *,
    gamma: float,
    lam: float,
    token_rewards: Floats | None = None,
) -> Array:
    """A_t = d_t + gamma lam A_t', d_t = r_t + gamma V_t' - V_t, t' the next trainable token. [rows, tokens] float64

    mask, rewards, token_rewards: see `returns_to_go`; values: [rows, tokens], V_t the value of the state in which token
    t is chosen. V = 0 after the last trainable token of a row. The result is 0 where untrainable; the critic's target
    is result + values. Raises ValueError as `returns_to_go` does.
    """
    check_share("gamma", gamma)
    check_share("lam", lam)
    packed = packed_rewards(mask, rewards, token_rewards)
    state = pack("values", values, mask)
    following = np.zeros_like(state)
    following[:, :-1] = state[:, 1:]  # behind a row's last token stands 0
    errors = packed + gamma * following - state
    return unpack(discounted_sums(errors, gamma * lam), mask)
