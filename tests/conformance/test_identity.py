"""Total ratio = discrepancy x staleness ratio, for every proximal (algorithms.md 2.1, 2.2, 18.1)."""

import numpy as np
import pytest
import torch

from palimpsest.services.learner.corrections import log_ratio
from tests.learner_parts.clipped_objective import clipped_loss, discrepancy_band

BEHAVIOR, OLD, CURRENT, ASYNC = -1.20, -1.10, -0.90, -0.95


def one(value: float) -> torch.Tensor:
    return torch.tensor([[value]])


def factors(proximal: float) -> tuple[float, float, float]:
    mask = torch.tensor([[True]])
    discrepancy = log_ratio(one(proximal), one(BEHAVIOR), mask).exp()
    staleness = log_ratio(one(CURRENT), one(proximal), mask).exp()
    return float(discrepancy), float(staleness), float(discrepancy * staleness)


@pytest.mark.parametrize(
    ("proximal", "discrepancy", "staleness"),
    [(OLD, 1.10517, 1.22140), (ASYNC, 1.28403, 1.05127), (BEHAVIOR, 1.0, 1.34986), (-0.975, 1.25232, 1.07788)],
    ids=["exact", "current_recompute", "bypass", "loglinear d=4"],
)
def test_example_a_splits_the_same_total_differently(proximal: float, discrepancy: float, staleness: float) -> None:
    got = factors(proximal)
    assert got[0] == pytest.approx(discrepancy, abs=5e-6)
    assert got[1] == pytest.approx(staleness, abs=5e-6)
    assert got[2] == pytest.approx(1.34986, abs=5e-6)


@pytest.mark.parametrize(
    ("proximal", "masked", "clipped"),
    [(OLD, False, True), (ASYNC, True, False), (BEHAVIOR, False, True)],
    ids=["exact: clipped", "current_recompute: masked as an engine mismatch", "bypass: clipped"],
)
def test_example_a_gets_opposite_diagnoses(proximal: float, masked: bool, clipped: bool) -> None:
    """c = 1.2, epsilon = 0.2, A > 0: algorithms.md, worked example A."""
    mask = torch.tensor([[True]])
    correction = discrepancy_band(one(proximal), one(BEHAVIOR), mask, band=1.2, use_mask=True, use_weight=True)
    result = clipped_loss(
        one(CURRENT), one(proximal), correction.weight, one(1.0), mask, clip_low=0.2, clip_high=0.2, denominator=1.0
    )
    assert bool(correction.masked) is masked
    assert bool(result.clipped) is clipped


def test_the_identity_holds_for_every_token_to_one_in_a_million() -> None:
    generator = np.random.default_rng(0)
    behavior, proximal, current = (
        torch.from_numpy(-generator.exponential(1.5, (64, 128)).astype(np.float32)) for _ in range(3)
    )
    mask = torch.from_numpy(generator.random((64, 128)) < 0.7)
    total = log_ratio(current, behavior, mask)
    parts = log_ratio(proximal, behavior, mask) + log_ratio(current, proximal, mask)
    assert float((total - parts).abs().max()) < 1e-6 * 20
    assert float((total.double() - parts.double()).abs().mean()) < 1e-6
