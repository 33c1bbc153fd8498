"""Generalized advantage estimation (GAE) over trainable tokens. Pure (docs/algorithms/gae.md)."""

import numpy as np

from palimpsest.services.learner.advantages.trainable_tokens import (
    Array,
    Floats,
    Mask,
    check_share,
    discounted_sums,
    last_slots,
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
    final_values: Floats | None = None,
) -> Array:
    """Return A_t = d_t + gamma lam A_t', d_t = r_t + gamma V_t' - V_t. [rows, tokens] float64; 0 where untrainable.

    t' is the next trainable token. mask, rewards, token_rewards: see `returns_to_go`; values: [rows, tokens], V_t is
    the value of the state in which token t is chosen; final_values: [rows], V after the last trainable token: 0 for a
    terminated trajectory (None: for all), the value of the last state for a truncated one. The critic's target is
    result + values. Raises ValueError as `returns_to_go` does.
    """
    check_share("gamma", gamma)
    check_share("lam", lam)
    packed = packed_rewards(mask, rewards, token_rewards)
    state = pack("values", values, mask)
    following = np.zeros_like(state)
    following[:, :-1] = state[:, 1:]
    if final_values is not None:
        if final_values.shape != mask.shape[:1] or not np.isfinite(final_values).all():
            raise ValueError(f"final_values must be {mask.shape[0]} finite values, got {final_values}")
        following += np.where(last_slots(mask), final_values[:, None], 0.0)
    errors = packed + gamma * following - state
    return unpack(discounted_sums(errors, gamma * lam), mask)
