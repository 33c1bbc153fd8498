"""EPO's hinge penalty on the entropy (algorithms.md 13, 18.14)."""

import json

import numpy as np
import pytest
import torch
from torch import Tensor

from palimpsest.services.learner.losses.entropy import (
    TURNS,
    WINDOW,
    EntropyHistory,
    Turns,
    epo_loss,
    hinge,
    phase_weight,
    trajectory_entropy,
)
from tests.oracles import objectives as oracle

CASES = 200


def of_all_turns(history: float | None) -> Turns:
    return np.full(TURNS, np.nan if history is None else history)


def penalty(
    entropy: Tensor, mask: Tensor, *, history: float | None = 1.0, weight: float = 0.5, low: float = 0.8
) -> tuple[float, Tensor]:
    """Value and gradient of the penalty over all trajectories; the upper bound of the band is 1.2."""
    leaf = entropy.clone().requires_grad_()
    rows = int(mask.any(-1).sum())
    loss = epo_loss(leaf, mask, history=of_all_turns(history), low=low, high=1.2, weight=weight, sequences=rows)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return float(loss.detach()), gradient


def test_value_and_gradient_equal_the_oracle() -> None:
    for seed in range(CASES):
        generator = np.random.default_rng(seed)
        shape = (int(generator.integers(1, 5)), int(generator.integers(1, 9)))
        mask = generator.random(shape) < 0.7
        mask[0, 0] = True
        entropy = generator.exponential(1.0, shape)
        expected, slopes = oracle.epo(entropy, mask, history=0.9, low=0.8, high=1.2, weight=0.3)
        loss, gradient = penalty(torch.tensor(entropy), torch.tensor(mask), history=0.9, weight=0.3)
        assert loss == pytest.approx(expected, rel=1e-9, abs=1e-12), f"seed {seed}"
        np.testing.assert_allclose(gradient, slopes, rtol=1e-9, atol=1e-12, err_msg=f"seed {seed}")


@pytest.mark.parametrize(
    ("entropy", "loss", "slope"),
    [(0.5, 0.15, -0.25), (1.5, 0.15, 0.25), (0.81, 0.0, 0.0), (1.0, 0.0, 0.0), (1.19, 0.0, 0.0)],
)
def test_18_14_the_hinge_has_a_gradient_outside_the_band_and_none_inside(
    entropy: float, loss: float, slope: float
) -> None:
    """History 1, band [0.8, 1.2], weight 0.5, two tokens: each token gets half the trajectory's slope."""
    found, gradient = penalty(torch.full((1, 2), entropy), torch.ones(1, 2, dtype=torch.bool))
    assert found == pytest.approx(loss, abs=1e-6)
    assert gradient.tolist() == [[slope, slope]]


def test_descending_the_penalty_brings_the_entropy_back() -> None:
    """A penalty without a gradient could not do this."""
    logits = torch.tensor([[[4.0, 0.0, 0.0, 0.0]]], requires_grad=True)
    mask, history = torch.ones(1, 1, dtype=torch.bool), 1.2
    start = None
    for _ in range(400):
        logprobs = logits.log_softmax(-1)
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        start = start or float(entropy.detach())
        loss = epo_loss(entropy, mask, history=of_all_turns(history), low=0.8, high=1.2, weight=1.0, sequences=1)
        (slope,) = torch.autograd.grad(loss, logits)
        with torch.no_grad():
            logits -= 0.2 * slope
    assert start is not None
    assert start < 0.3
    assert float(entropy.detach()) >= 0.8 * history - 0.01
    assert float(entropy.detach()) < 1.2 * history


def test_one_trajectory_above_and_one_below_do_not_cancel() -> None:
    entropy = torch.tensor([[0.5, 0.5], [1.5, 1.5]])
    loss, gradient = penalty(entropy, torch.ones(2, 2, dtype=torch.bool))
    assert loss == pytest.approx(0.15)
    assert gradient.tolist() == [[-0.125, -0.125], [0.125, 0.125]]


def test_without_a_history_there_is_no_penalty() -> None:
    loss, gradient = penalty(torch.full((1, 2), 7.0), torch.ones(1, 2, dtype=torch.bool), history=None)
    assert loss == 0.0
    assert (gradient == 0).all()


def test_18_7_and_18_8_the_mean_excludes_untrainable_and_nonfinite_tokens() -> None:
    entropy = torch.tensor([[0.5, 99.0, float("nan"), 0.7], [5.0, float("nan"), 5.0, 5.0]])
    mask = torch.tensor([[True, False, True, True], [False] * 4])
    means, present = trajectory_entropy(entropy, mask)
    assert means.tolist() == pytest.approx([0.6, 0.0])
    assert present.tolist() == [True, False]
    loss, gradient = penalty(entropy, mask)
    assert loss == pytest.approx(0.5 * 0.2)
    assert gradient.tolist() == [[-0.25, 0.0, 0.0, -0.25], [0.0] * 4]


def test_each_turn_is_compared_with_its_own_history() -> None:
    """Turns of 0.5 and 2.0 nats with histories 1.0 and 2.0: only the first is outside; a third has no history."""
    mask = torch.tensor([[True, False, True, True, False, True]])
    entropy = torch.tensor([[0.5, 9.0, 1.5, 2.5, 9.0, 50.0]], dtype=torch.float64, requires_grad=True)
    history = of_all_turns(None)
    history[:2] = (1.0, 2.0)
    loss = epo_loss(entropy, mask, history=history, low=0.8, high=1.2, weight=1.0, sequences=1)
    (gradient,) = torch.autograd.grad(loss, entropy)
    assert float(loss.detach()) == pytest.approx((0.3 + 0.0) / 2)
    assert gradient.tolist() == [[-0.5, 0.0, 0.0, 0.0, 0.0, 0.0]]


def test_the_history_of_a_turn_is_cumulative_or_of_the_newest_five_versions() -> None:
    history = EntropyHistory()
    values = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    for value in values:
        turns = of_all_turns(None)
        turns[0] = value
        if value != 7.0:  # no trajectory of the newest version has a second turn
            turns[1] = 10 * value
        history.add(value, turns)
    assert history.turns("cumulative")[:2].tolist() == pytest.approx([4.0, 35.0])
    assert history.turns("window")[:2].tolist() == pytest.approx([sum(values[-WINDOW:]) / 5, 40.0])
    assert np.isnan(history.turns("window")[2:]).all()


def test_the_phase_weight_equals_the_published_schedule() -> None:
    """K = 150, so h = 75: 1 - 0.2 (1 - e^(-2k/75)) up to 75, then 0.8 e^(-3 (k - 75) / 75)."""
    expected = {0: 1.0, 25: 0.9026834, 75: 0.8270671, 76: 0.7686316, 100: 0.2943036, 150: 0.0398297}
    assert {k: phase_weight(k, 150, 3.0) for k in expected} == pytest.approx(expected, abs=5e-8)


def test_a_checkpoint_without_turns_can_be_restored() -> None:
    history = EntropyHistory()
    history.restore({"mean": [3.0, 2.0]})
    assert history.mean == 1.5
    assert np.isnan(history.turns("cumulative")).all()


def test_the_hinge_is_the_distance_from_the_band() -> None:
    entropies = torch.tensor([0.3, 0.8, 1.0, 1.2, 2.0], dtype=torch.float64)
    assert hinge(entropies, 1.0, low=0.8, high=1.2).tolist() == pytest.approx([0.5, 0.0, 0.0, 0.0, 0.8])


def test_the_history_is_the_mean_of_earlier_versions() -> None:
    history = EntropyHistory()
    assert history.mean is None
    seen = []
    for entropy in (1.0, 2.0, 6.0):
        seen.append(history.mean)  # the mean that the version's penalty uses
        history.add(entropy)
    assert seen == [None, 1.0, 1.5]
    assert history.mean == 3.0


def test_a_history_restored_from_a_checkpoint_equals_the_original() -> None:
    history, restored = EntropyHistory(), EntropyHistory()
    for entropy in (0.1, 0.7, 1.3):
        history.add(entropy, of_all_turns(entropy))
    restored.restore(json.loads(json.dumps(history.state())))
    history.add(0.4, of_all_turns(0.4))
    restored.add(0.4, of_all_turns(0.4))
    assert restored.mean == history.mean
    for kind in ("cumulative", "window"):
        np.testing.assert_array_equal(restored.turns(kind), history.turns(kind))


@pytest.mark.parametrize("entropy", [float("nan"), float("inf")])
def test_18_8_a_history_refuses_a_nonfinite_entropy(entropy: float) -> None:
    history = EntropyHistory()
    with pytest.raises(ValueError, match="leave versions without one out"):
        history.add(entropy)
    assert history.mean is None


def test_a_band_with_low_above_high_is_refused() -> None:
    with pytest.raises(ValueError, match=r"entropy band of EPO is \[1\.3, 1\.2\]"):
        penalty(torch.ones(1, 1), torch.ones(1, 1, dtype=torch.bool), low=1.3)
