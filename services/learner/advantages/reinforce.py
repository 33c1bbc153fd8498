"""Return-to-go of each trainable token, as REINFORCE++ takes it. Pure; docs/algorithms/reinforce-pp.md."""

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
    """What the rest of the trajectory brought, from each trainable token on. [rows, tokens] float64; 0 elsewhere

    mask: [rows, tokens] bool, trainable tokens; rewards: [rows], given at the last trainable token; token_rewards:
    [rows, tokens], each token's own reward besides (for example minus a KL estimate). A later reward counts gamma^n,
    n the trainable tokens between: tool tokens neither discount it nor stop it. Raises ValueError for other shapes,
    for what is not finite, and for gamma outside [0, 1].

    >>> import numpy as np
    >>> returns_to_go(np.array([[False, True, False, False, True]]), np.array([8.0]), gamma=0.5).tolist()
    [[0.0, 4.0, 0.0, 0.0, 8.0]]
    """
    check_share("gamma", gamma)
    return unpack(discounted_sums(packed_rewards(mask, rewards, token_rewards), gamma), mask)
