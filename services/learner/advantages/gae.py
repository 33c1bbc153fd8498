"""Generalised advantage estimation over trainable tokens. Pure; docs/algorithms/gae.md."""

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


def generalised_advantages(
    mask: Mask,
    rewards: Floats,
    values: Floats,
    *,
    gamma: float,
    lam: float,
    truncated: Mask | None = None,
    token_rewards: Floats | None = None,
) -> Array:
    """A_t = d_t + gamma lam A_t', d_t = r_t + gamma V_t' - V_t, t' the next trainable token. [rows, tokens] float64

    mask, rewards, token_rewards: see `returns_to_go`; values: [rows, tokens], V_t the value of the state in which token
    t is chosen; truncated: [rows] bool. The result is 0 where untrainable. What the critic should have said is the
    result + values. Raises ValueError as `returns_to_go` does.

    After the last trainable token V = 0: the trajectory is over. A truncated one is not; there the value of its last
    token stands in. The state behind that token would be the right one, but often nothing stands there for which the
    critic spoke, and at the limit of a context nothing can. The two states are one token apart.
    """
    check_share("gamma", gamma)
    check_share("lam", lam)
    packed = packed_rewards(mask, rewards, token_rewards)
    state = pack("values", values, mask)
    following = np.zeros_like(state)
    following[:, :-1] = state[:, 1:]  # behind a row's last token stands 0
    if truncated is not None:
        if truncated.dtype != np.bool_ or truncated.shape != rewards.shape:
            raise ValueError(f"truncated is {truncated.dtype} of shape {truncated.shape}: bool, [rows] is due")
        following = np.where(last_slots(mask) & truncated[:, None], state, following)
    errors = packed + gamma * following - state
    return unpack(discounted_sums(errors, gamma * lam), mask)
