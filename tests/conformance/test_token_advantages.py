"""Token-level advantages and credit across tool output, in float64 (algorithms.md 8, 16.3c, 18.7, 18.13)."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from palimpsest.services.learner.advantages import MicroBatchRewards, group_advantages, token_advantages
from palimpsest.services.learner.advantages.gae import generalized_advantages
from palimpsest.services.learner.advantages.reinforce import returns_to_go
from palimpsest.services.learner.advantages.whiten import Moments, merged, whitened
from palimpsest.services.learner.model.critic import value_loss
from tests.oracles import advantages as oracle

CASES = 200


@dataclass(frozen=True)
class Draw:
    mask: oracle.Mask
    rewards: oracle.Array
    own: oracle.Array | None
    values: oracle.Array
    gamma: float
    lam: float


def draw(seed: int) -> Draw:
    """Random masks: full, with gaps of any length, single tokens, rows and whole batches without trainable tokens."""
    generator = np.random.default_rng(seed)
    rows, tokens = int(generator.integers(1, 6)), int(generator.integers(1, 24))
    share = float(generator.choice([0.0, 0.1, 0.5, 0.9, 1.0], p=[0.05, 0.25, 0.4, 0.2, 0.1]))
    mask = generator.random((rows, tokens)) < share
    mask[generator.random(rows) < 0.15] = False
    return Draw(
        mask=mask,
        rewards=generator.normal(0, 1, rows),
        own=generator.normal(0, 0.1, (rows, tokens)) if seed % 3 else None,
        values=generator.normal(0, 1, (rows, tokens)),
        gamma=float(generator.choice([1.0, 0.99, 0.5, 0.0])),
        lam=float(generator.choice([1.0, 0.95, 0.3, 0.0])),
    )


def test_the_random_masks_cover_all_cases() -> None:
    draws = [draw(seed) for seed in range(CASES)]
    counts = [d.mask.sum(axis=1) for d in draws]
    assert sum(bool((c == 0).any() and (c > 0).any()) for c in counts) > 20  # some rows without trainable tokens
    assert sum(not c.any() for c in counts) >= 3  # no trainable token at all
    gaps = [np.diff(np.flatnonzero(row)) for d in draws for row in d.mask]
    assert sum(bool((gap > 1).any()) for gap in gaps) > 100


def test_return_to_go_equals_the_oracle() -> None:
    for seed in range(CASES):
        d = draw(seed)
        ours = returns_to_go(d.mask, d.rewards, gamma=d.gamma, token_rewards=d.own)
        expected = oracle.returns_to_go(d.mask, d.rewards, d.own, d.gamma)
        np.testing.assert_allclose(ours, expected, rtol=1e-10, atol=1e-12, err_msg=f"seed {seed}")


def test_gae_equals_the_mixture_of_k_step_estimates() -> None:
    for seed in range(CASES):
        d = draw(seed)
        ours = generalized_advantages(d.mask, d.rewards, d.values, gamma=d.gamma, lam=d.lam, token_rewards=d.own)
        expected = oracle.generalized(d.mask, d.rewards, d.own, d.values, d.gamma, d.lam)
        np.testing.assert_allclose(ours, expected, rtol=1e-9, atol=1e-11, err_msg=f"seed {seed}")


def test_gae_with_lambda_1_is_the_return_less_the_value() -> None:
    for seed in range(CASES):
        d = draw(seed)
        ours = generalized_advantages(d.mask, d.rewards, d.values, gamma=d.gamma, lam=1.0, token_rewards=d.own)
        expected = oracle.returns_to_go(d.mask, d.rewards, d.own, d.gamma) - np.where(d.mask, d.values, 0.0)
        np.testing.assert_allclose(ours, expected, rtol=1e-9, atol=1e-11, err_msg=f"seed {seed}")


def test_18_7_numbers_at_untrainable_tokens_change_nothing() -> None:
    for seed in range(CASES):
        d = draw(seed)
        spoilt = np.where(d.mask, d.values, np.nan)
        own = None if d.own is None else np.where(d.mask, d.own, np.inf)
        settings = {"gamma": d.gamma, "lam": d.lam}
        clean = generalized_advantages(d.mask, d.rewards, d.values, token_rewards=d.own, **settings)
        assert np.array_equal(
            generalized_advantages(d.mask, d.rewards, spoilt, token_rewards=own, **settings), clean
        ), f"seed {seed}"
        assert not clean[~d.mask].any()
        assert np.array_equal(
            returns_to_go(d.mask, d.rewards, gamma=d.gamma, token_rewards=own),
            returns_to_go(d.mask, d.rewards, gamma=d.gamma, token_rewards=d.own),
        )
        even = whitened([(d.values, d.mask)], gather=lambda own: [own])[0]
        assert np.array_equal(whitened([(spoilt, d.mask)], gather=lambda own: [own])[0], even)


TWO_TURNS = np.array([[False, True, True, False, False, False, True, True, True, False]])
"""A prompt token, a turn of two, three tokens of a tool, a turn of three, padding."""


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_18_13_reinforce_keeps_credit_across_a_tool_gap(gamma: float) -> None:
    """The early turn gets the late reward, discounted only by the trainable tokens between."""
    returns = returns_to_go(TWO_TURNS, np.array([2.0]), gamma=gamma)
    expected = [0, 2 * gamma**4, 2 * gamma**3, 0, 0, 0, 2 * gamma**2, 2 * gamma, 2, 0]
    assert returns[0].tolist() == pytest.approx(expected)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.9, 0.8)])
def test_18_13_gae_keeps_credit_across_a_tool_gap(gamma: float, lam: float) -> None:
    """With values of 0 the advantage is the reward, discounted by gamma lam for each trainable token between."""
    values = np.zeros(TWO_TURNS.shape)
    estimated = generalized_advantages(TWO_TURNS, np.array([2.0]), values, gamma=gamma, lam=lam)
    rate = gamma * lam
    expected = [0, 2 * rate**4, 2 * rate**3, 0, 0, 0, 2 * rate**2, 2 * rate, 2, 0]
    assert estimated[0].tolist() == pytest.approx(expected)


def test_18_13_the_length_of_tool_output_does_not_change_credit() -> None:
    generator = np.random.default_rng(0)
    for seed in range(CASES):
        d = draw(seed)
        wide = np.concatenate([d.mask, d.mask], axis=1)
        wide[:, 1::2], wide[:, ::2] = False, d.mask  # an untrainable token behind each
        values, own = generator.normal(0, 1, wide.shape), generator.normal(0, 1, wide.shape)
        values[:, ::2] = d.values
        settings = {"gamma": d.gamma, "lam": d.lam}
        narrow = generalized_advantages(d.mask, d.rewards, d.values, token_rewards=own[:, ::2], **settings)
        stretched = generalized_advantages(wide, d.rewards, values, token_rewards=own, **settings)
        assert np.array_equal(stretched[:, ::2], narrow), f"seed {seed}"


def test_multiplying_by_the_mask_loses_the_credit_of_the_early_turn() -> None:
    """The error that 16.3c describes: the tests above must tell the two apart."""
    running, returns = 0.0, np.zeros(TWO_TURNS.shape[1])
    for t in reversed(range(TWO_TURNS.shape[1])):
        running = ((2.0 if t == 8 else 0.0) + running) * TWO_TURNS[0, t]
        returns[t] = running
    assert returns[[1, 2]].tolist() == [0.0, 0.0]
    assert returns_to_go(TWO_TURNS, np.array([2.0]), gamma=1.0)[0, [1, 2]].tolist() == [2.0, 2.0]


def test_whitening_equals_the_oracle_for_any_split_over_ranks() -> None:
    for seed in range(CASES):
        generator = np.random.default_rng(seed)
        drawn = [draw(1000 * seed + i) for i in range(int(generator.integers(1, 7)))]
        parts = [(d.values * 3 + 100, d.mask) for d in drawn]
        expected = oracle.whitened(parts)
        owner = generator.integers(0, 3, len(parts))  # some ranks hold nothing
        shares = [[part for part, rank in zip(parts, owner, strict=True) if rank == r] for r in range(3)]
        for rank, ours in enumerate(on_ranks(shares)):
            theirs = [e for e, r in zip(expected, owner, strict=True) if r == rank]
            assert len(ours) == len(theirs)
            for got, wanted in zip(ours, theirs, strict=True):
                np.testing.assert_allclose(got, wanted, rtol=1e-9, atol=1e-9, err_msg=f"seed {seed}")


def on_ranks(shares: list[list[tuple[oracle.Array, oracle.Mask]]]) -> list[list[oracle.Array]]:
    """Result of each rank for its share, with a gather that returns the moments of all ranks."""
    sent: list[Moments] = []

    def send(own: Moments) -> list[Moments]:
        sent.append(own)
        return [own]

    for share in shares:
        whitened(share, gather=send)
    return [whitened(share, gather=lambda _: list(sent)) for share in shares]


def test_whitened_tokens_have_mean_0_and_deviation_1() -> None:
    seen = 0
    for seed in range(CASES):
        d = draw(seed)
        if d.mask.sum() < 2:
            continue
        seen += 1
        even = whitened([(d.values, d.mask)], gather=lambda own: [own])[0][d.mask]
        assert even.mean() == pytest.approx(0.0, abs=1e-9)
        assert even.std(ddof=1) == pytest.approx(1.0, rel=1e-5)
    assert seen > 100


@pytest.mark.parametrize("value", [0.1, 0.3, 1e6 / 7])
def test_equal_values_whiten_to_zeros_exactly(value: float) -> None:
    mask = np.random.default_rng(1).random((3, 11)) < 0.7
    parts = [(np.full((3, 11), value), mask), (np.full((3, 11), value), ~mask)]
    for share in on_ranks([parts[:1], parts[1:], []]):
        assert all(not even.any() for even in share)
    assert sum(len(share) for share in on_ranks([parts[:1], parts[1:], []])) == 2


def test_merged_moments_keep_a_small_variance_with_a_large_mean() -> None:
    values = 1e8 + np.array([0.0, 1.0, 2.0, 3.0])
    whole = merged([Moments.of(values[:1]), Moments.of(values[1:]), Moments.of(values[:0])])
    assert whole.squares == pytest.approx(5.0)
    assert (whole.count, whole.low, whole.high) == (4, 1e8, 1e8 + 3)


def alone(own: Moments) -> list[Moments]:
    return [own]


@pytest.mark.parametrize("kind", ["reinforce_pp", "reinforce_pp_baseline", "gae"])
def test_token_advantages_equal_the_combined_oracles(kind: str) -> None:
    for seed in range(CASES):
        drawn = [draw(seed), draw(seed + CASES)]
        gamma, lam = drawn[0].gamma, drawn[0].lam
        given = [np.array(group_advantages(kind, [*d.rewards, 0.5]))[:-1] for d in drawn]
        parts = [
            MicroBatchRewards(d.mask, r, token_rewards=d.own, values=d.values)
            for d, r in zip(drawn, given, strict=True)
        ]
        ours = token_advantages(kind, parts, gamma=gamma, lam=lam, gather=alone)
        before, returns = [], []
        for d, rewards in zip(drawn, given, strict=True):
            if kind == "reinforce_pp":
                assert rewards.tolist() == d.rewards.tolist()
            if kind == "gae":
                raw = oracle.generalized(d.mask, d.rewards, d.own, d.values, gamma, lam)
                returns.append(np.where(d.mask, raw + d.values, 0.0))
            else:
                raw = oracle.returns_to_go(d.mask, rewards, d.own, gamma)
                returns.append(raw)
            before.append((raw, d.mask))
        # float32 results; at 1e-8 in the variance rounding counts where the returns hardly differ
        for got, wanted, whole in zip(ours, oracle.whitened(before), returns, strict=True):
            assert got.advantages.dtype == got.returns.dtype == np.float32
            np.testing.assert_allclose(got.advantages, wanted, rtol=1e-5, atol=1e-6, err_msg=f"seed {seed}")
            np.testing.assert_allclose(got.returns, whole, rtol=1e-5, atol=1e-6, err_msg=f"seed {seed}")


@pytest.mark.parametrize("clip", [None, 0.2, 1.0])
def test_the_value_loss_and_its_gradient_equal_the_oracle(clip: float | None) -> None:
    for seed in range(CASES):
        generator = np.random.default_rng(seed)
        shape = (int(generator.integers(1, 5)), int(generator.integers(1, 9)))
        before, returns = generator.normal(0, 1, shape), generator.normal(0, 1, shape)
        now, mask = before + generator.normal(0, 0.5, shape), generator.random(shape) < 0.7
        returns[~mask], before[~mask] = np.nan, np.inf  # values at untrainable tokens must not count
        values = torch.tensor(now, requires_grad=True)
        loss = value_loss(
            values, torch.tensor(returns), torch.tensor(before), torch.tensor(mask), clip=clip, denominator=7.0
        )
        loss.backward()
        expected, gradient = oracle.clipped_value_loss(now, returns, before, mask, clip=clip, denominator=7.0)
        assert float(loss.detach()) == pytest.approx(expected, rel=1e-9, abs=1e-12), f"seed {seed}"
        assert values.grad is not None
        np.testing.assert_allclose(values.grad.numpy(), gradient, rtol=1e-9, atol=1e-12, err_msg=f"seed {seed}")


@pytest.mark.parametrize("kind", ["rloo", "grpo"])
def test_18_13_group_advantages_equal_the_oracle(kind: str) -> None:
    expected: Callable[[list[float]], list[float]] = oracle.leave_one_out if kind == "rloo" else oracle.over_deviation
    for seed in range(CASES):
        generator = np.random.default_rng(seed)
        rewards = generator.random(int(generator.integers(2, 17))).tolist()
        assert group_advantages(kind, rewards) == pytest.approx(expected(rewards), rel=1e-9, abs=1e-12)
