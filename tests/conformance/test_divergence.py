"""Estimators of the divergence, and the penalty (algorithms.md 9)."""

import numpy as np
import pytest
import torch

from palimpsest.services.learner.losses.kl import Estimator, estimate, k1, k2, k3, kl_loss
from tests.oracles import divergence as oracle

CASES = 200
ESTIMATORS: tuple[Estimator, ...] = ("k1", "k2", "k3")


@pytest.mark.parametrize(
    ("log_ratio", "first", "second", "third", "turned"),
    [
        (0.1, -0.1, 0.005, 0.00517, 0.00484),
        (-0.5, 0.5, 0.125, 0.10653, 0.14872),
        (2.0, -2.0, 2.0, 4.38906, 1.13534),
    ],
)
def test_table_of_the_estimators(log_ratio: float, first: float, second: float, third: float, turned: float) -> None:
    x = torch.tensor(log_ratio, dtype=torch.float64)
    assert float(k1(x)) == pytest.approx(first)
    assert float(k2(x)) == pytest.approx(second)
    assert float(k3(x)) == pytest.approx(third, abs=5e-6)
    assert float(k3(-x)) == pytest.approx(turned, abs=5e-6)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimators_equal_the_oracle(name: Estimator) -> None:
    for seed in range(CASES):
        q, p = np.random.default_rng(seed).uniform(0.01, 1, 2)
        ours = estimate(torch.tensor(np.log(p) - np.log(q)), name)
        assert float(ours) == pytest.approx(oracle.estimate(q, p, name), rel=1e-9, abs=1e-12)


def distributions(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits of the current policy; probabilities of the reference and of the behavior policy."""
    generator = np.random.default_rng(seed)
    logits, *others = generator.normal(0, 0.7, (3, 6))
    return logits, oracle.softmax(others[0]), oracle.softmax(others[1])


def expected_loss(
    logits: np.ndarray, reference: np.ndarray, sampled: np.ndarray, name: Estimator, *, unbiased: bool
) -> tuple[float, np.ndarray]:
    """Value and gradient of the expected kl_loss over samples of the behavior policy, by exact summation."""
    leaf = torch.tensor(logits, requires_grad=True)
    behavior = torch.tensor(sampled)
    losses = kl_loss(
        leaf.log_softmax(-1)[None],
        torch.tensor(np.log(reference))[None],
        behavior.log()[None],
        torch.ones(1, len(logits), dtype=torch.bool),
        estimator=name,
        unbiased=unbiased,
    )
    loss = (behavior * losses[0]).sum()
    (gradient,) = torch.autograd.grad(loss, leaf)
    return float(loss.detach()), gradient.numpy()


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_unbiased_penalty_has_the_gradient_of_the_divergence_under_any_sampling_policy(name: Estimator) -> None:
    for seed in range(CASES):
        logits, reference, behavior = distributions(seed)
        for sampled in (behavior, oracle.softmax(logits)):
            value, gradient = expected_loss(logits, reference, sampled, name, unbiased=True)
            np.testing.assert_allclose(gradient, oracle.kl_gradient(logits, reference), rtol=1e-8, atol=1e-12)
            if name != "k2":  # the biased one
                assert value == pytest.approx(oracle.kl(oracle.softmax(logits), reference), rel=1e-9)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_without_the_total_ratio_stale_samples_bias_the_gradient(name: Estimator) -> None:
    logits, reference, behavior = distributions(1)
    _, gradient = expected_loss(logits, reference, behavior, name, unbiased=False)
    assert np.abs(gradient - oracle.kl_gradient(logits, reference)).max() > 1e-2


def test_the_estimators_expect_samples_of_q() -> None:
    """Under q, k1 and k3 of log p - log q average to KL(q || p); k3 of log q - log p does not."""
    for seed in range(CASES):
        _, p, q = distributions(seed)
        log_ratio = torch.tensor(np.log(p) - np.log(q))
        assert float((torch.tensor(q) * k1(log_ratio)).sum()) == pytest.approx(oracle.kl(q, p), rel=1e-9)
        assert float((torch.tensor(q) * k3(log_ratio)).sum()) == pytest.approx(oracle.kl(q, p), rel=1e-9)
        assert float((torch.tensor(q) * k3(-log_ratio)).sum()) != pytest.approx(oracle.kl(q, p), rel=1e-3)


def test_the_gradients_of_k1_and_k3_are_not_that_of_the_divergence() -> None:
    """Over samples of the current policy the gradient of k1 is zero, and that of k3 is KL(reference || current)'s."""
    logits, reference, _ = distributions(2)
    leaf = torch.tensor(logits, requires_grad=True)
    current = leaf.log_softmax(-1)
    apart = torch.tensor(np.log(reference)) - current
    sampled = current.exp().detach()
    (of_k1,) = torch.autograd.grad((sampled * k1(apart)).sum(), leaf, retain_graph=True)
    (of_k3,) = torch.autograd.grad((sampled * k3(apart)).sum(), leaf)
    np.testing.assert_allclose(of_k1, np.zeros(6), atol=1e-12)
    np.testing.assert_allclose(of_k3, oracle.softmax(logits) - reference, rtol=1e-9)
    assert np.abs(of_k3.numpy() - oracle.kl_gradient(logits, reference)).max() > 1e-2


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_18_8_a_token_without_a_finite_log_prob_has_no_penalty(name: Estimator, unbiased: bool) -> None:
    values = torch.full((4, 3), -1.0, dtype=torch.float64)
    current, reference, behavior = (values + shift for shift in (0.1, 0.0, -0.1))
    current[0, 0], reference[1, 1], behavior[2, 2] = float("nan"), float("-inf"), float("inf")
    mask = torch.ones(4, 3, dtype=torch.bool)
    mask[3] = False
    current.requires_grad_()
    losses = kl_loss(current, reference, behavior, mask, estimator=name, unbiased=unbiased)
    (gradient,) = torch.autograd.grad(losses.sum(), current)
    dropped = torch.eye(4, 3, dtype=torch.bool) | ~mask
    assert (losses[dropped] == 0).all()
    assert (gradient[dropped] == 0).all()
    weight = np.exp(0.2) if unbiased else 1.0
    np.testing.assert_allclose(gradient[~dropped], 0.1 * weight, rtol=1e-9)
    value = {"k1": 0.1, "k2": 0.005, "k3": np.exp(-0.1) - 0.9}[name]
    np.testing.assert_allclose(losses[~dropped].detach(), weight * value, rtol=1e-9)


def test_one_bad_token_gives_a_finite_penalty() -> None:
    current = torch.full((1, 1), -200.0, requires_grad=True)
    flat = torch.zeros(1, 1)
    losses = kl_loss(current, flat, flat, torch.ones(1, 1, dtype=torch.bool), estimator="k3", unbiased=False)
    assert float(losses.detach()) == pytest.approx(np.exp(20) - 21, rel=1e-6)


def test_an_unknown_estimator_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown divergence estimator 'k4'; use one of k1, k2, k3"):
        estimate(torch.zeros(1), "k4")  # type: ignore[arg-type]
