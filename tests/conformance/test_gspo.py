"""GSPO: one ratio and one clip for a whole trajectory (algorithms.md 7)."""

import numpy as np
import pytest
import torch

from palimpsest.services.learner.losses.aggregate import Denominators, aggregate
from palimpsest.services.learner.losses.gspo import gspo_loss
from palimpsest.services.learner.losses.types import Inputs
from tests.learner_parts.objectives import CASES, OFF, gradient


def three_tokens(advantage: float) -> Inputs:
    """One trajectory with log-ratios .1, -.3, .05."""
    current = torch.tensor([[0.1, -0.3, 0.05]], dtype=torch.float64) - 1.0
    flat = torch.full_like(current, -1.0)
    ones = torch.ones_like(current)
    return Inputs(current.requires_grad_(), flat, flat, ones, advantage * ones, ones.bool())


def test_gspo_ratio_is_the_geometric_mean() -> None:
    """algorithms.md 7: log-ratios .1, -.3, .05 give s = e^-.05 = .95123."""
    inputs = three_tokens(1.0)
    outcome = gspo_loss(inputs, clip_low=1.0, clip_high=OFF)
    np.testing.assert_allclose(outcome.losses.detach(), [[-0.95123] * 3], atol=5e-6)
    np.testing.assert_allclose(outcome.log_update, [[-0.05] * 3], atol=1e-12)
    np.testing.assert_allclose(gradient(outcome, inputs), [[-0.95123] * 3], atol=5e-6)


def test_gspo_clips_the_whole_trajectory_by_the_sign_of_its_advantage() -> None:
    """s = 0.95123 is below 1 - 3e-4: with A < 0 the clip binds, with A > 0 it does not."""
    bad = three_tokens(-1.0)
    outcome = gspo_loss(bad, clip_low=3e-4, clip_high=4e-4)
    np.testing.assert_allclose(outcome.losses.detach(), [[0.9997] * 3], atol=1e-12)
    assert outcome.clipped["clip_low"].all()
    assert (gradient(outcome, bad) == 0).all()
    good = three_tokens(1.0)
    outcome = gspo_loss(good, clip_low=3e-4, clip_high=4e-4)
    assert not outcome.touched.any()
    assert (gradient(outcome, good) != 0).all()


def test_gspo_per_token_has_the_value_and_gradient_of_the_trajectory_form() -> None:
    for seed in range(CASES):
        generator = np.random.default_rng(seed)
        rows, tokens = int(generator.integers(1, 4)), int(generator.integers(1, 7))
        mask = torch.tensor(generator.random((rows, tokens)) < 0.8)
        mask[:, 0] = True
        proximal = torch.tensor(-generator.exponential(1.0, (rows, tokens)))
        current = (proximal + torch.tensor(generator.normal(0, 0.2, (rows, tokens)))).requires_grad_()
        advantages = torch.tensor(generator.normal(0, 1, (rows, 1)))
        whole = advantages.expand(rows, tokens)
        inputs = Inputs(current, proximal, proximal, torch.ones_like(proximal), whole, mask)
        denominators = Denominators.of(mask.sum(-1).tolist(), 100)
        losses = gspo_loss(inputs, clip_low=0.05, clip_high=0.05).losses
        token_form = aggregate(losses, mask, "seq_mean_token_mean", denominators)
        mean = torch.where(mask, current - proximal, 0.0).sum(-1) / mask.sum(-1)
        ratio = mean.exp()[:, None]
        sequence_form = -torch.minimum(ratio * advantages, ratio.clamp(0.95, 1.05) * advantages).mean()
        assert float(token_form.detach()) == pytest.approx(float(sequence_form.detach()), rel=1e-9)
        (ours,), (theirs,) = (torch.autograd.grad(loss, current) for loss in (token_form, sequence_form))
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12, err_msg=f"seed {seed}")
