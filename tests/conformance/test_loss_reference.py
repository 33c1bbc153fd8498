"""The objective compared with a float64 oracle, and its invariants (algorithms.md 18.1, 18.7, 18.12)."""

import numpy as np
import pytest
import torch

from tests.learner_parts.clipped_objective import clipped_loss, discrepancy_band
from tests.oracles.clipped import decoupled_clipped

CASES = 200
OFF = 1e9
"""A bound that never binds."""


def draw(seed: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    shape = (int(generator.integers(1, 5)), int(generator.integers(1, 9)))
    behavior = -generator.exponential(1.0, shape)
    proximal = behavior + generator.normal(0, 0.4, shape)
    return {
        "behavior": behavior,
        "proximal": proximal,
        "current": proximal + generator.normal(0, 0.4, shape),
        "advantages": generator.normal(0, 1, shape),
        "mask": generator.random(shape) < 0.8,
    }


def ours(
    data: dict[str, np.ndarray], *, proximal: np.ndarray, low: float, high: float, band: float | None, weighted: bool
) -> tuple[float, np.ndarray]:
    current = torch.tensor(data["current"], dtype=torch.float64, requires_grad=True)
    anchor, behavior = torch.tensor(proximal), torch.tensor(data["behavior"])
    mask = torch.tensor(data["mask"])
    correction = discrepancy_band(
        anchor, behavior, mask, band=band or 2.0, use_mask=band is not None, use_weight=weighted
    )
    result = clipped_loss(
        current,
        anchor,
        correction.weight,
        torch.tensor(data["advantages"]),
        mask,
        clip_low=low,
        clip_high=high,
        denominator=float(max(1, data["mask"].sum())),
    )
    result.loss.backward()
    assert current.grad is not None
    return float(result.loss.detach()), current.grad.numpy()


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("band", [None, 1.2, 2.0])
def test_loss_and_gradient_equal_the_oracle(band: float | None, weighted: bool) -> None:
    for seed in range(CASES):
        data = draw(seed)
        loss, gradient = ours(data, proximal=data["proximal"], low=0.2, high=0.28, band=band, weighted=weighted)
        expected_loss, expected_gradient = decoupled_clipped(**data, low=0.2, high=0.28, band=band, weighted=weighted)
        assert loss == pytest.approx(expected_loss, rel=1e-6, abs=1e-9), f"seed {seed}"
        np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-6, atol=1e-9, err_msg=f"seed {seed}")


def test_with_all_thresholds_off_every_proximal_gives_the_same_gradient() -> None:
    for seed in range(CASES):
        data = draw(seed)
        anchors = {
            "exact": data["proximal"],
            "current_recompute": data["current"] - 0.05,
            "bypass": data["behavior"],
        }
        gradients = {
            name: ours(data, proximal=anchor, low=1.0, high=OFF, band=None, weighted=True)[1]
            for name, anchor in anchors.items()
        }
        for name, gradient in gradients.items():
            np.testing.assert_allclose(gradient, gradients["exact"], rtol=1e-6, atol=1e-12, err_msg=f"{name} {seed}")


def test_without_the_discrepancy_weight_the_gradients_differ() -> None:
    """The invariance of the gradient requires the weight."""
    data = draw(3)
    exact = ours(data, proximal=data["proximal"], low=1.0, high=OFF, band=None, weighted=False)[1]
    bypass = ours(data, proximal=data["behavior"], low=1.0, high=OFF, band=None, weighted=False)[1]
    assert np.abs(exact - bypass).max() > 1e-3


def test_numbers_at_untrainable_tokens_change_nothing() -> None:
    data = draw(5)
    assert not data["mask"].all()
    loss, gradient = ours(data, proximal=data["proximal"], low=0.2, high=0.2, band=2.0, weighted=True)
    for name in ("behavior", "proximal", "current", "advantages"):
        data[name] = np.where(data["mask"], data[name], 1e6)
    again, gradient_again = ours(data, proximal=data["proximal"], low=0.2, high=0.2, band=2.0, weighted=True)
    assert again == loss
    assert (gradient_again == gradient).all()


def test_masking_half_the_tokens_halves_the_gradient_of_the_rest() -> None:
    """The denominator includes masked tokens: nothing is renormalized."""
    behavior = torch.full((1, 4), -1.0)
    proximal = torch.tensor([[-1.0, -1.0, 5.0 - 1.0, 5.0 - 1.0]])
    mask = torch.ones(1, 4, dtype=torch.bool)
    correction = discrepancy_band(proximal, behavior, mask, band=2.0, use_mask=True, use_weight=True)
    assert correction.masked.tolist() == [[False, False, True, True]]
    current = proximal.clone().requires_grad_()
    result = clipped_loss(
        current, proximal, correction.weight, torch.ones(1, 4), mask, clip_low=0.2, clip_high=0.2, denominator=4.0
    )
    result.loss.backward()
    assert float(result.loss.detach()) == pytest.approx(-0.5)
    assert current.grad is not None
    assert current.grad.tolist() == [[-0.25, -0.25, 0.0, 0.0]]


@pytest.mark.parametrize("where", ["proximal", "behavior"])
@pytest.mark.parametrize("what", [float("nan"), float("-inf")])
def test_a_token_without_a_finite_log_prob_is_masked(where: str, what: float) -> None:
    values = {"proximal": torch.full((1, 2), -1.0), "behavior": torch.full((1, 2), -1.1)}
    values[where][0, 1] = what
    mask = torch.ones(1, 2, dtype=torch.bool)
    correction = discrepancy_band(**values, mask=mask, band=2.0, use_mask=False, use_weight=True)
    assert correction.masked.tolist() == [[False, True]]
    current = torch.full((1, 2), -0.9, requires_grad=True)
    result = clipped_loss(
        current,
        values["proximal"],
        correction.weight,
        torch.ones(1, 2),
        mask,
        clip_low=0.2,
        clip_high=0.2,
        denominator=2.0,
    )
    result.loss.backward()
    assert torch.isfinite(result.loss)
    assert current.grad is not None
    assert torch.isfinite(current.grad).all()
    assert float(current.grad[0, 1]) == 0.0


@pytest.mark.parametrize(
    ("ratio", "advantage", "objective", "clipped"),
    [
        (1.5, 1.0, 1.2, True),
        (1.5, -1.0, -1.5, False),
        (0.5, -1.0, -0.8, True),
        (0.5, 1.0, 0.5, False),
        (1.1, 2.0, 2.2, False),
    ],
)
def test_the_clip_depends_on_the_sign_of_the_advantage(
    ratio: float, advantage: float, objective: float, clipped: bool
) -> None:
    mask = torch.tensor([[True]])
    current = torch.tensor([[float(np.log(ratio))]], requires_grad=True)
    result = clipped_loss(
        current,
        torch.zeros(1, 1),
        torch.ones(1, 1),
        torch.tensor([[advantage]]),
        mask,
        clip_low=0.2,
        clip_high=0.2,
        denominator=1.0,
    )
    result.loss.backward()
    assert float(result.loss.detach()) == pytest.approx(-objective, rel=1e-6)
    assert bool(result.clipped) is clipped
    assert current.grad is not None
    assert (float(current.grad) == 0.0) is clipped
