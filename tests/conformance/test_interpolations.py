"""The interpolations between behavior and current log-probs, and their bands (algorithms.md 2.3, 2.4, 18.2)."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from palimpsest.common.versions import Version
from palimpsest.services.learner.batch.batching import PaddedBatch, pad
from palimpsest.services.learner.observability.surrogate_error import Thresholds, clipped, masked
from palimpsest.services.learner.proximal.surrogates.interp_prox_loglinear import Loglinear
from palimpsest.services.learner.proximal.surrogates.linear_prox import LinearProx
from tests.learner_parts.models import CPU
from tests.oracles import surrogates as oracle
from tests.records.builders import a_row

pytestmark = pytest.mark.thorough

NOW = Version(8)
DRAWS = 200


def drawn(seed: int) -> tuple[PaddedBatch, Tensor, NDArray[np.bool_]]:
    """A batch of random behavior, its current log-probs in float64, and its mask."""
    generator = np.random.default_rng(seed)
    length = int(generator.integers(2, 12))
    rows = []
    for i in range(3):
        versions = np.where(generator.random(length) < 0.2, -1, NOW - generator.integers(0, 9, length))
        rows.append(
            a_row(
                f"r{i}",
                [7] * length,
                versions.tolist(),
                behavior=(-generator.exponential(1.0, length)).tolist(),
                advantage=float(generator.normal()),
            )
        )
    batch = pad(rows)
    return batch, torch.from_numpy(batch.behavior + generator.normal(0, 0.7, batch.behavior.shape)), batch.mask


def test_loglinear_equals_the_oracle() -> None:
    for seed in range(DRAWS):
        batch, now, mask = drawn(seed)
        got = Loglinear(CPU).proximal([batch], NOW).anchor(0, now, torch.from_numpy(mask)).logprobs.numpy()
        expected = oracle.loglinear(batch.behavior.astype(np.float64), now.numpy(), NOW - batch.versions)
        np.testing.assert_allclose(got[mask], expected[mask], rtol=1e-12, err_msg=f"seed {seed}")
        at_most_1 = mask & (NOW - batch.versions <= 1)
        assert (got[at_most_1] == batch.behavior[at_most_1]).all()


def test_linear_equals_the_oracle() -> None:
    for seed in range(DRAWS):
        batch, now, mask = drawn(seed)
        alpha = float(np.random.default_rng(seed).random())
        source = LinearProx(CPU, behavior_share=alpha)
        got = source.proximal([batch], NOW).anchor(0, now, torch.from_numpy(mask)).logprobs.numpy()
        expected = oracle.linear(batch.behavior.astype(np.float64), now.numpy(), alpha)
        np.testing.assert_allclose(got[mask], expected[mask], rtol=1e-9, atol=1e-12, err_msg=f"seed {seed}")


def test_18_2_proposition_1_the_loglinear_constraints_are_bands_on_the_total_ratio() -> None:
    kinds = {True: 0, False: 0}
    for seed in range(DRAWS):
        batch, now, mask = drawn(seed)
        thresholds = Thresholds(band=1.2, clip_low=0.2, clip_high=0.28)
        proximal = Loglinear(CPU).proximal([batch], NOW).anchor(0, now, torch.from_numpy(mask)).logprobs.numpy()
        behavior = batch.behavior.astype(np.float64)
        is_masked = masked(proximal, behavior, thresholds)
        is_clipped = clipped(now.numpy(), proximal, batch.advantages, thresholds)
        total = np.exp(now.numpy() - behavior)
        for i in zip(*np.nonzero(mask), strict=True):
            staleness = max(1, int(NOW - batch.versions[i]))
            low, high = oracle.loglinear_clip_band(staleness, low=0.2, high=0.28)
            beyond = total[i] > high if batch.advantages[i] > 0 else total[i] < low
            assert is_clipped[i] == beyond, f"seed {seed}, {i}"
            below, above = oracle.loglinear_mask_band(staleness, band=1.2)
            assert is_masked[i] == (not below <= total[i] <= above), f"seed {seed}, {i}"
            kinds[bool(is_clipped[i])] += 1
    assert min(kinds.values()) > 100  # both outcomes occurred


def test_18_2_the_bands_have_the_worked_values() -> None:
    assert oracle.loglinear_clip_band(4, low=0.2, high=0.2) == pytest.approx((0.4096, 2.0736))
    assert oracle.loglinear_mask_band(4, band=1.2) == pytest.approx((0.7842, 1.2752), abs=5e-5)
    assert oracle.loglinear_clip_band(2, low=0.2, high=0.2)[1] == pytest.approx(1.44)
    assert oracle.loglinear_mask_band(2, band=1.2)[1] == pytest.approx(1.44)
    assert oracle.linear_clip_band(0.25, low=0.2, high=0.2) == pytest.approx((0.5, 3.0))
    assert oracle.linear_clip_band(0.5, low=0.2, high=0.2) == pytest.approx((2 / 3, 1.5))
    assert oracle.linear_clip_band(1 / 6, low=0.2, high=0.2)[1] == np.inf


def test_18_2_at_a_staleness_above_2_the_mask_removes_every_clipped_token() -> None:
    """With c = 1 + epsilon, every clipped token is masked too."""
    thresholds = Thresholds(band=1.2, clip_low=0.2, clip_high=0.2)
    total = np.linspace(-5.0, 5.0, 2001)[None]
    for staleness in range(3, 9):
        row = a_row("a", [7] * 2001, [NOW - staleness] * 2001, behavior=[-6.0] * 2001)
        now = torch.from_numpy(total - 6.0)
        got = Loglinear(CPU).proximal([pad([row])], NOW).anchor(0, now, torch.ones(1, 2001, dtype=torch.bool))
        proximal = got.logprobs.numpy()
        removed = masked(proximal, np.full_like(proximal, -6.0), thresholds)
        for advantage in (1.0, -1.0):
            gone = clipped(now.numpy(), proximal, np.full_like(proximal, advantage), thresholds)
            assert gone.any()
            assert not (gone & ~removed).any()


def linear_clips(alpha: float, epsilon: float, total: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Whether tokens with these log total ratios and a positive advantage are clipped."""
    count = total.shape[1]
    row = a_row("a", [7] * count, [NOW - 3] * count, behavior=[-9.0] * count)
    now = torch.from_numpy(total - 9.0)
    got = LinearProx(CPU, behavior_share=alpha).proximal([pad([row])], NOW)
    proximal = got.anchor(0, now, torch.ones(1, count, dtype=torch.bool)).logprobs.numpy()
    return clipped(now.numpy(), proximal, np.ones_like(total), Thresholds(None, epsilon, epsilon))


def test_18_2_the_arithmetic_clip_never_fires_for_alpha_up_to_epsilon_over_1_plus_epsilon() -> None:
    for seed in range(DRAWS):
        generator = np.random.default_rng(seed)
        epsilon = float(generator.uniform(0.05, 0.4))
        total = generator.uniform(-8.0, 8.0, (1, 400))
        never = epsilon / (1 + epsilon) * float(generator.choice([1.0, generator.random()]))
        assert not linear_clips(never, epsilon, total).any(), f"seed {seed}"
        alpha = float(generator.uniform(epsilon / (1 + epsilon) + 0.05, 1.0))
        _, high = oracle.linear_clip_band(alpha, low=epsilon, high=epsilon)
        gone = linear_clips(alpha, epsilon, total)
        assert (gone == (np.exp(total) > high)).all(), f"seed {seed}"
        assert gone.any()
