"""Properties of all surrogates and of each (algorithms.md 2.1 to 2.4, 4.4 to 4.9, 18.1 to 18.4)."""

import importlib
import inspect
import math
import pkgutil
import typing
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from palimpsest.common.config.learner import LearnerConfig, OptimizerConfig
from palimpsest.common.config.proximal import ProximalConfig
from palimpsest.common.versions import Version
from palimpsest.services.learner.batch.batching import PaddedBatch, pad
from palimpsest.services.learner.corrections import log_ratio
from palimpsest.services.learner.model.policy import token_logprobs
from palimpsest.services.learner.model.trainable import TrainablePolicy
from palimpsest.services.learner.proximal import surrogates
from palimpsest.services.learner.proximal.surrogates.ewma_prox import EwmaProx
from palimpsest.services.learner.proximal.surrogates.factory import build_surrogate
from palimpsest.services.learner.proximal.types import Exact, Interpolated, Source, Surrogate
from tests.learner_parts.models import CPU, CurrentModel, load
from tests.records.builders import a_row

pytestmark = pytest.mark.thorough

NOW = Version(8)
KINDS: list[dict[str, object]] = [
    {"kind": "bypass"},
    {"kind": "current_recompute"},
    {"kind": "interp_prox_loglinear"},
    {"kind": "linear_prox", "behavior_share": 0.3},
    {"kind": "ewma_prox", "decay": 0.7},
    {"kind": "ppo_ewma_async", "window": "max_staleness"},
    {"kind": "ppo_ewma_async", "window": "measured", "reset": "guarded"},
]
EVERY = pytest.mark.parametrize("keys", KINDS, ids=lambda keys: "/".join(str(value) for value in keys.values()))


def section(keys: dict[str, object]) -> ProximalConfig:
    return LearnerConfig.model_validate({"versions": 1, "proximal": keys}).proximal


def step_randomly(policy: TrainablePolicy, seed: int) -> None:
    """Take one optimizer step along random gradients, to the next version."""
    generator = torch.Generator().manual_seed(seed)
    for gradient in policy.gradients():
        gradient.copy_(torch.randn(gradient.shape, generator=generator))
    policy.step()


def trained(
    folder: Path, keys: dict[str, object], *, versions: int = 3, max_staleness: int = 8, lr: float = 3e-3
) -> tuple[TrainablePolicy, Source]:
    """A policy trained for some versions, and the source that followed it."""
    model = load(folder)
    policy = TrainablePolicy(model, OptimizerConfig(lr=lr, epsilon=1e-3))
    source = build_surrogate(
        section(keys), model=model, masters=policy.masters, device=CPU, max_staleness=max_staleness
    )
    for version in range(versions):
        step_randomly(policy, version)
        if hasattr(source, "published"):
            source.published(policy.masters, active_share=0.95, mean_staleness=2.0)
    return policy, source


def batches(folder: Path, *, seed: int = 0) -> list[PaddedBatch]:
    """Two micro-batches of unequal rows with gaps; staleness 0 to 8; behavior near the starting model's log-probs."""
    generator = np.random.default_rng(seed)
    model, made = load(folder), []
    for lengths in ([9, 14, 22], [30, 17]):
        rows = []
        for length in lengths:
            versions = np.where(generator.random(length) < 0.25, -1, NOW - generator.integers(0, 9, length))
            versions[0] = -1
            rows.append(
                a_row(
                    f"r{length}",
                    generator.integers(3, 250, length).tolist(),
                    versions.tolist(),
                    behavior=[0.0] * length,
                    advantage=float(generator.normal()),
                    temperature=0.9,
                )
            )
        batch = pad(rows)
        near = CurrentModel(model).proximal([batch], NOW).logprobs[0].numpy()
        noise = generator.normal(0, 0.2, near.shape)
        batch.behavior[:] = np.where(batch.mask, np.minimum(near + noise, -1e-3), 0.0)
        made.append(batch)
    return made


@torch.no_grad()
def current(policy: TrainablePolicy, batch: PaddedBatch) -> Tensor:
    return token_logprobs(policy.model, torch.from_numpy(batch.tokens), torch.from_numpy(batch.temperatures))


@EVERY
def test_18_1_the_two_factors_give_the_total_ratio(keys: dict[str, object], starting_model: Path) -> None:
    policy, source = trained(starting_model, keys)
    made = batches(starting_model)
    proximal = source.proximal(made, NOW)
    step_randomly(policy, 99)  # a later minibatch
    for place, batch in enumerate(made):
        mask, behavior, now = torch.from_numpy(batch.mask), torch.from_numpy(batch.behavior), current(policy, batch)
        anchor = proximal.anchor(place, now, mask).logprobs
        total = log_ratio(now, behavior, mask)
        parts = log_ratio(anchor, behavior, mask) + log_ratio(now, anchor, mask)
        assert float((parts - total).abs().max()) <= 1e-6
        assert float((log_ratio(now, behavior, mask)[mask]).abs().max()) < 10  # far from the bound of 20
        product = log_ratio(anchor, behavior, mask).exp() * log_ratio(now, anchor, mask).exp()
        assert torch.allclose(product, total.exp(), rtol=2e-6, atol=0)


@EVERY
def test_18_1_with_all_thresholds_off_the_gradient_is_that_of_exact(
    keys: dict[str, object], starting_model: Path
) -> None:
    """This requires that no gradient passes through the proximal."""
    policy, source = trained(starting_model, keys)
    made = batches(starting_model, seed=1)
    proximal = source.proximal(made, NOW)
    generator = torch.Generator().manual_seed(5)
    exact = Exact(
        [torch.from_numpy(b.behavior) + 0.3 * torch.randn(b.behavior.shape, generator=generator) for b in made]
    )
    for place, batch in enumerate(made):
        mask, behavior = torch.from_numpy(batch.mask), torch.from_numpy(batch.behavior).double()
        gradients = []
        for values in (proximal, exact):
            now = current(policy, batch).double().requires_grad_()
            anchor = values.anchor(place, now, mask).logprobs
            assert not anchor.requires_grad
            weight = log_ratio(anchor.double(), behavior, mask).exp()
            update = log_ratio(now, anchor.double(), mask).exp()
            torch.where(mask, weight * update * torch.from_numpy(batch.advantages), 0.0).sum().backward()
            assert now.grad is not None
            gradients.append(now.grad)
        assert torch.allclose(gradients[0], gradients[1], rtol=1e-6, atol=1e-12)
        assert float(gradients[0][mask].abs().min()) > 0


@EVERY
def test_untrainable_tokens_are_0_and_change_nothing(keys: dict[str, object], starting_model: Path) -> None:
    """algorithms.md 18.7."""
    policy, source = trained(starting_model, keys)
    (batch, _) = batches(starting_model, seed=2)
    mask, now = torch.from_numpy(batch.mask), current(policy, batch)
    anchor = source.proximal([batch], NOW).anchor(0, now, mask)
    assert float(anchor.logprobs[~mask].abs().max()) == 0.0
    assert bool(torch.isfinite(anchor.logprobs).all())
    assert anchor.logprobs.dtype is torch.float32
    batch.behavior[~batch.mask] = np.nan
    again = source.proximal([batch], NOW).anchor(0, torch.where(mask, now, torch.nan), mask)
    assert torch.equal(again.logprobs[mask], anchor.logprobs[mask])


@EVERY
def test_surrogates_never_claim_to_be_exact(keys: dict[str, object], starting_model: Path) -> None:
    policy, source = trained(starting_model, keys)
    made = batches(starting_model, seed=3)
    proximal = source.proximal(made, NOW)
    assert not isinstance(proximal, Exact)
    assert isinstance(proximal, Surrogate | Interpolated)
    assert proximal.method == keys["kind"]
    for place, batch in enumerate(made):
        mask = torch.from_numpy(batch.mask)
        anchor = proximal.anchor(place, current(policy, batch), mask)
        assert not anchor.exact.any()
        assert not anchor.missing.any()


def classes() -> Iterator[type]:
    """Every class of the package that has a `proximal` method."""
    for module in pkgutil.iter_modules(surrogates.__path__):
        loaded = importlib.import_module(f"{surrogates.__name__}.{module.name}")
        for _, found in inspect.getmembers(loaded, inspect.isclass):
            if found.__module__ == loaded.__name__ and hasattr(found, "proximal"):
                yield found


def test_no_surrogate_returns_the_type_exact() -> None:
    found = {kind.__name__: typing.get_type_hints(kind.proximal)["return"] for kind in classes()}
    assert len(found) == 6
    assert set(found.values()) == {Surrogate, Interpolated}


def test_no_surrogate_module_imports_the_type_exact() -> None:
    for module in pkgutil.iter_modules(surrogates.__path__):
        loaded = importlib.import_module(f"{surrogates.__name__}.{module.name}")
        assert not {name for name, value in vars(loaded).items() if value is Exact}, module.name


A = {"behavior": -1.20, "old": -1.10, "current": -0.90, "async": -0.95}


def of_one_token(source: Source, staleness: int, *, current: float = A["current"]) -> float:
    """Proximal log-prob of the token of example A."""
    batch = pad([a_row("a", [5, 6], [-1, NOW - staleness], behavior=[0.0, A["behavior"]])])
    proximal = source.proximal([batch], NOW)
    mask = torch.from_numpy(batch.mask)
    return float(proximal.anchor(0, torch.tensor([[0.0, current]]), mask).logprobs[0, 1])


@pytest.mark.parametrize(
    ("keys", "proximal", "discrepancy", "staleness"),
    [
        ({"kind": "bypass"}, -1.20, 1.0, 1.34986),
        ({"kind": "interp_prox_loglinear"}, -0.975, 1.25232, 1.07788),
        ({"kind": "linear_prox", "behavior_share": 0.25}, -0.96699, 1.26239, 1.06928),
    ],
    ids=["bypass", "loglinear d=4", "arithmetic, same weights"],
)
def test_18_2_example_a(
    keys: dict[str, object], proximal: float, discrepancy: float, staleness: float, starting_model: Path
) -> None:
    got = of_one_token(trained(starting_model, keys, versions=0)[1], 4)
    assert got == pytest.approx(proximal, abs=5e-6)
    assert math.exp(got - A["behavior"]) == pytest.approx(discrepancy, abs=5e-6)
    assert math.exp(A["current"] - got) == pytest.approx(staleness, abs=5e-6)


def test_18_3_the_average_includes_the_current_version(starting_model: Path) -> None:
    """Weights 1, beta, beta^2 on theta(2), theta(1), theta(0), in float32, cast to the model's type for the pass."""
    decay, made = 0.6, batches(starting_model)
    model = load(starting_model)
    policy = TrainablePolicy(model, OptimizerConfig(lr=1e-2, epsilon=1e-3))
    source = EwmaProx(model, policy.masters, CPU, decay=decay)
    thetas = [[master.double().clone() for master in policy.masters]]
    plain = load(starting_model)
    for version in range(3):
        shares = [decay ** (version - k) for k in range(version + 1)]
        with torch.no_grad():
            for place, parameter in enumerate(plain.parameters()):
                mean = sum(share * theta[place] for share, theta in zip(shares, thetas, strict=True)) / sum(shares)
                assert torch.allclose(source.average.means[place].double(), mean, rtol=1e-5, atol=1e-8)
                parameter.copy_(source.average.means[place])
        expected = CurrentModel(plain).proximal(made, Version(version)).logprobs
        got = source.proximal(made, Version(version)).logprobs
        for batch, ours, theirs in zip(made, got, expected, strict=True):
            mask = torch.from_numpy(batch.mask)
            assert torch.equal(ours[mask], theirs[mask])
        step_randomly(policy, version)
        thetas.append([master.double().clone() for master in policy.masters])
        source.published(policy.masters, active_share=1.0, mean_staleness=0.0)


SAME_AT_0: list[dict[str, object]] = [
    {"kind": "current_recompute"},
    {"kind": "ewma_prox", "decay": 0.0},
    {"kind": "ppo_ewma_async", "window": "max_staleness"},
    {"kind": "ppo_ewma_async", "window": "measured"},
    {"kind": "ppo_ewma_async", "window": 0, "reset": "off"},
]


@pytest.mark.parametrize("keys", SAME_AT_0, ids=lambda keys: "/".join(str(value) for value in keys.values()))
@pytest.mark.parametrize("kind", ["starting_model", "untied_model"])
def test_18_4_at_staleness_0_surrogates_equal_the_snapshot_bit_for_bit(
    keys: dict[str, object], kind: str, request: pytest.FixtureRequest
) -> None:
    """With max_staleness 0 the current weights give the old log-probs; the ratio before the first step is 1."""
    folder = request.getfixturevalue(kind)
    model = load(folder)
    policy = TrainablePolicy(model, OptimizerConfig(lr=3e-3, epsilon=1e-3))
    source = build_surrogate(section(keys), model=model, masters=policy.masters, device=CPU, max_staleness=0)
    made = batches(folder)
    for version in range(3):
        exact, got = CurrentModel(model).proximal(made, Version(version)), source.proximal(made, Version(version))
        for place, batch in enumerate(made):
            mask, now = torch.from_numpy(batch.mask), current(policy, batch)
            anchor = got.anchor(place, now, mask).logprobs
            assert torch.equal(anchor[mask], exact.logprobs[place][mask])
            assert float(log_ratio(now, anchor, mask).abs().max()) == 0.0
        step_randomly(policy, version)
        if hasattr(source, "published"):
            source.published(policy.masters, active_share=1.0, mean_staleness=0.0)


def test_current_recompute_gives_a_ratio_of_1_before_the_first_step(starting_model: Path) -> None:
    """For every staleness; the ratio to the old log-probs is not 1."""
    policy, source = trained(starting_model, {"kind": "current_recompute"})
    made = batches(starting_model)
    proximal = source.proximal(made, NOW)
    old = CurrentModel(load(starting_model)).proximal(made, NOW)
    for place, batch in enumerate(made):
        mask, now = torch.from_numpy(batch.mask), current(policy, batch)
        assert torch.equal(log_ratio(now, proximal.anchor(place, now, mask).logprobs, mask), torch.zeros(mask.shape))
        assert float(log_ratio(now, old.logprobs[place], mask).abs().max()) > 0.1


@EVERY
def test_a_surrogate_does_not_change_the_policy(keys: dict[str, object], starting_model: Path) -> None:
    policy, source = trained(starting_model, keys)
    before = {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}
    masters = [master.clone() for master in policy.masters]
    learns = [parameter.requires_grad for parameter in policy.model.parameters()]
    source.proximal(batches(starting_model), NOW)
    assert all(torch.equal(tensor, before[name]) for name, tensor in policy.model.state_dict().items())
    assert all(torch.equal(now, then) for now, then in zip(policy.masters, masters, strict=True))
    assert [parameter.requires_grad for parameter in policy.model.parameters()] == learns
    assert all(float(gradient.abs().max()) == 0.0 for gradient in policy.gradients())
