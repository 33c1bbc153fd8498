"""Token-level advantages computed by hand, and refused input.

tests/conformance/test_token_advantages.py compares them with reference implementations.
"""

import numpy as np
import pytest

from palimpsest.services.learner.advantages import MicroBatchRewards, token_advantages
from palimpsest.services.learner.advantages.gae import generalized_advantages
from palimpsest.services.learner.advantages.reinforce import returns_to_go
from palimpsest.services.learner.advantages.trainable_tokens import discounted_sums, last_slots, pack, slots, unpack
from palimpsest.services.learner.advantages.whiten import Moments, whitened

MASK = np.array([[False, True, False, True, True], [True, False, False, False, False], [False] * 5])
REWARDS = np.array([1.0, 2.0, 3.0])


def single_rank(own: Moments) -> list[Moments]:
    return [own]


def test_packing_gathers_trainable_tokens_and_unpacking_restores_them() -> None:
    values = np.arange(15.0).reshape(3, 5)
    packed = pack("values", values, MASK)
    assert packed.tolist() == [[1.0, 3.0, 4.0], [5.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    assert unpack(packed, MASK).tolist() == np.where(MASK, values, 0.0).tolist()
    assert slots(MASK).sum(axis=1).tolist() == [3, 1, 0]
    assert last_slots(MASK).tolist() == [[False, False, True], [True, False, False], [False, False, False]]


@pytest.mark.parametrize("places", [0, 1, 2, 3, 7, 8, 9, 100])
def test_sums_by_doubling_equal_the_recursion(places: int) -> None:
    values = np.random.default_rng(places).normal(0, 1, (2, places))
    expected, running = np.zeros_like(values), np.zeros(2)
    for t in reversed(range(places)):
        running = values[:, t] + 0.9 * running
        expected[:, t] = running
    np.testing.assert_allclose(discounted_sums(values, 0.9), expected, rtol=1e-12, atol=1e-14)


def test_a_tokens_cost_lowers_the_return_of_all_tokens_before_it() -> None:
    """With a KL penalty inside the reward, a token's return includes its own cost and the costs of later tokens."""
    costs = np.array([[9.0, 0.1, 9.0, 0.2, 0.4]] * 3)
    returns = returns_to_go(MASK, REWARDS, gamma=1.0, token_rewards=-costs)
    assert returns[0].tolist() == pytest.approx([0.0, 0.3, 0.0, 0.4, 0.6])
    assert returns[1].tolist() == pytest.approx([-7.0, 0.0, 0.0, 0.0, 0.0])
    assert returns[2].tolist() == [0.0] * 5


def test_a_truncated_trajectory_bootstraps_with_the_value_of_its_last_state() -> None:
    """V = (.5, .6, .8) and .7 after the last token, gamma .9, lambda .5: the last error is 1 + .9 * .7 - .8."""
    values = np.array([[7.0, 0.5, 7.0, 0.6, 0.8]])
    ours = generalized_advantages(
        MASK[:1], REWARDS[:1], values, gamma=0.9, lam=0.5, final_values=np.array([0.7], dtype=np.float32)
    )
    last = 1.0 + 0.9 * 0.7 - 0.8
    middle = (0.9 * 0.8 - 0.6) + 0.45 * last
    first = (0.9 * 0.6 - 0.5) + 0.45 * middle
    assert ours[0].tolist() == pytest.approx([0.0, first, 0.0, middle, last])
    with pytest.raises(ValueError, match="final_values must be 1 finite values"):
        generalized_advantages(MASK[:1], REWARDS[:1], values, gamma=0.9, lam=0.5, final_values=np.array([np.nan]))


def test_gae_by_hand() -> None:
    """V = (.5, .6, .8), gamma .9, lambda .5: accumulates TD errors from the last token backward."""
    values = np.array([[7.0, 0.5, 7.0, 0.6, 0.8]])
    ours = generalized_advantages(MASK[:1], REWARDS[:1], values, gamma=0.9, lam=0.5)
    last = 1.0 - 0.8
    middle = (0.9 * 0.8 - 0.6) + 0.45 * last
    first = (0.9 * 0.6 - 0.5) + 0.45 * middle
    assert ours[0].tolist() == pytest.approx([0.0, first, 0.0, middle, last])


def test_the_value_after_the_last_token_is_zero() -> None:
    values = np.array([[0.0, 0.5, 0.0, 0.6, 0.8]])
    advantages = generalized_advantages(MASK[:1], np.zeros(1), values, gamma=1.0, lam=0.95)
    assert advantages[0, 4] == -0.8


def test_reinforce_whitens_over_tokens_not_trajectories() -> None:
    """Three tokens of return 1 and one of 5: mean 2, unbiased deviation 2."""
    part = MicroBatchRewards(MASK, np.array([1.0, 5.0, 100.0]))
    (ours,) = token_advantages("reinforce_pp", [part], gamma=1.0, lam=1.0, gather=single_rank)
    assert ours.advantages[0].tolist() == pytest.approx([0.0, -0.5, 0.0, -0.5, -0.5])
    assert ours.advantages[1].tolist() == pytest.approx([1.5, 0.0, 0.0, 0.0, 0.0])
    assert ours.advantages[2].tolist() == [0.0] * 5
    assert ours.returns[:2].max(axis=1).tolist() == [1.0, 5.0]


def test_gae_returns_are_the_targets_of_the_critic() -> None:
    values = np.random.default_rng(0).normal(0, 1, MASK.shape).astype(np.float32)
    (ours,) = token_advantages(
        "gae", [MicroBatchRewards(MASK, REWARDS, values=values)], gamma=1.0, lam=1.0, gather=single_rank
    )
    assert ours.returns[MASK].tolist() == pytest.approx([1.0, 1.0, 1.0, 2.0])
    assert not ours.returns[~MASK].any()


def test_a_batch_without_trainable_tokens_gives_zeros() -> None:
    empty = np.zeros((2, 3), dtype=bool)
    part = MicroBatchRewards(empty, np.ones(2), values=np.ones((2, 3)))
    for kind in ("reinforce_pp", "gae"):
        (ours,) = token_advantages(kind, [part], gamma=1.0, lam=1.0, gather=single_rank)
        assert not ours.advantages.any()
        assert ours.advantages.shape == (2, 3)


def test_a_rank_without_rows_joins_the_gather() -> None:
    gathered: list[Moments] = []

    def gather(own: Moments) -> list[Moments]:
        gathered.append(own)
        return [own, Moments(4, 0.5, 1.0, 0.0, 1.0)]

    assert token_advantages("reinforce_pp", [], gamma=1.0, lam=1.0, gather=gather) == []
    assert [own.count for own in gathered] == [0]


def test_a_single_trainable_token_whitens_to_0() -> None:
    assert whitened([(np.array([[4.0, 5.0]]), np.array([[False, True]]))], gather=single_rank)[0].tolist() == [
        [0.0, 0.0]
    ]


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"mask": MASK.astype(int)}, "the mask is int64"),
        ({"mask": MASK[0]}, r"of shape \(5,\); it must be bool, \[rows, tokens\]"),
        ({"rewards": REWARDS[:2]}, r"rewards has shape \(2,\); expected one for each of 3 rows"),
        ({"rewards": np.array([1.0, np.nan, 0.0])}, "rewards: nan is not finite"),
        ({"token_rewards": np.zeros((3, 4))}, r"token_rewards has shape \(3, 4\), the mask \(3, 5\)"),
        ({"token_rewards": np.full((3, 5), np.inf)}, "token_rewards: 4 of 4 trainable tokens are not finite"),
        ({"values": np.where(MASK, np.nan, 0.0)}, "values: 4 of 4 trainable tokens are not finite"),
        ({"gamma": 1.5}, r"gamma is 1.5; it must be in \[0, 1\]"),
        ({"lam": -0.1}, r"lam is -0.1; it must be in \[0, 1\]"),
    ],
)
def test_invalid_arguments_are_refused(changed: dict, says: str) -> None:
    given = {"mask": MASK, "rewards": REWARDS, "values": np.zeros(MASK.shape), "gamma": 1.0, "lam": 1.0} | changed
    with pytest.raises(ValueError, match=says):
        generalized_advantages(**given)


def test_gae_without_values_and_group_level_kinds_are_refused() -> None:
    with pytest.raises(ValueError, match="gae needs the values of the critic"):
        token_advantages("gae", [MicroBatchRewards(MASK, REWARDS)], gamma=1.0, lam=1.0, gather=single_rank)
    with pytest.raises(ValueError, match="grpo is not a token-level kind of advantages"):
        token_advantages("grpo", [MicroBatchRewards(MASK, REWARDS)], gamma=1.0, lam=1.0, gather=single_rank)
