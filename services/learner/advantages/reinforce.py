"""Return-to-go of each trainable token, as used by REINFORCE++. Pure (docs/algorithms/reinforce-pp.md)."""

from palimpsest.services.learner.advantages.trainable_tokens import (
    Array,
    Floats,
    Mask,
    check_share,
    discounted_sums,
    packed_rewards,
    unpack,
)


def returns_to_go(mask: Mask, rewards: Floats, *, gamma: float, token_rewards: Floats | None = None) -> Array:
    """Return the discounted sum of rewards from each trainable token on. [rows, tokens] float64; 0 elsewhere.

    mask: [rows, tokens] bool, trainable tokens; rewards: [rows], placed at the last trainable token; token_rewards:
    [rows, tokens], additional reward of each token (for example minus a KL estimate). A reward n trainable tokens later
    is multiplied by gamma^n; tool tokens neither discount nor end the sum. Raises ValueError for differing shapes,
    values that are not finite, and gamma outside [0, 1].

    >>> import numpy as np
    >>> returns_to_go(np.array([[False, True, False, False, True]]), np.array([8.0]), gamma=0.5).tolist()
    [[0.0, 4.0, 0.0, 0.0, 8.0]]
    """
    check_share("gamma", gamma)
    return unpack(discounted_sums(packed_rewards(mask, rewards, token_rewards), gamma), mask)
