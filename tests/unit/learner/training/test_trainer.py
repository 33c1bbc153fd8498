"""Training of a version: splits do not change the gradient, and proximal log-probs stay fixed."""

import math
from pathlib import Path

import pytest
import torch

from palimpsest.common.config.learner import OptimizerConfig
from palimpsest.common.config.objective import DiscrepancyConfig, LossConfig
from palimpsest.common.versions import Version
from palimpsest.services.learner.batch.batching import Row
from palimpsest.services.learner.distributed import ProcessGroup
from palimpsest.services.learner.model.policy import token_logprobs_and_entropy
from palimpsest.services.learner.model.trainable import TrainablePolicy
from palimpsest.services.learner.training.host_memory import HeapTrimmer
from tests.learner_parts.models import CurrentModel, load, train
from tests.records.builders import UNCORRECTED, a_learner, a_row


def rows(count: int = 12) -> list[Row]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for i in range(count):
        length = 6 + i % 5
        tokens = torch.randint(3, 250, (length,), generator=generator).tolist()
        versions = [-1, -1, 0, 0, -1] + [0] * (length - 5)
        made.append(a_row(f"r{i:02d}", tokens, versions, advantage=(-1.0) ** i * (1 + i / 5), behavior=[-5.0] * length))
    return made


def gradients(folder: Path, minibatches: list[list[Row]], **changes: object) -> list[torch.Tensor]:
    """Summed gradients of the first minibatch, in float32, so that only the split can change them."""
    model = load(folder).float()
    policy = TrainablePolicy(model, OptimizerConfig())
    taken: list[torch.Tensor] = []
    policy.step = lambda **_: taken.extend(g.clone() for g in policy.gradients()) or 1.0  # type: ignore[method-assign]
    config = a_learner(discrepancy=UNCORRECTED, **changes)
    train(policy, CurrentModel(model), ProcessGroup(), minibatches, Version(0), config=config)
    return taken[: len(policy.masters)]


def test_18_12_splitting_into_micro_batches_does_not_change_the_gradient(starting_model: Path) -> None:
    """algorithms.md 18.12."""
    whole = gradients(starting_model, [rows()])
    for tokens in (1, 20, 33):
        for a, b in zip(whole, gradients(starting_model, [rows()], micro_batch_tokens=tokens), strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-7)


def test_the_order_of_rows_does_not_change_the_gradient(starting_model: Path) -> None:
    for a, b in zip(gradients(starting_model, [rows()]), gradients(starting_model, [rows()[::-1]]), strict=True):
        assert torch.equal(a, b)


def test_the_proximal_is_computed_once_before_the_first_of_several_steps(starting_model: Path) -> None:
    model = load(starting_model)
    policy, source = TrainablePolicy(model, OptimizerConfig(lr=1e-2)), CurrentModel(model)
    before = CurrentModel(load(starting_model))
    trained = train(
        policy,
        source,
        ProcessGroup(),
        [rows()[:6], rows()[6:]],
        Version(0),
        config=a_learner(discrepancy=UNCORRECTED),
    )
    assert source.calls == 1
    assert policy.steps == 2
    first, second = trained.micro_batches
    assert (first.first, second.first) == (True, False)
    for scored in (first, second):
        mask = torch.from_numpy(scored.batch.mask)
        (anchor,) = before.proximal([scored.batch], Version(0)).logprobs
        assert torch.equal(scored.proximal[mask], anchor[mask])
    moved = torch.from_numpy(second.batch.mask)
    assert torch.equal(
        first.current[torch.from_numpy(first.batch.mask)], first.proximal[torch.from_numpy(first.batch.mask)]
    )
    assert float((second.current - second.proximal)[moved].abs().mean()) > 1e-2


def test_18_8_a_batch_without_a_finite_gradient_is_skipped_and_reported(starting_model: Path) -> None:
    model = load(starting_model)
    policy = TrainablePolicy(model, OptimizerConfig())
    bad = [a_row("bad", [5, 6, 7], [-1, 0, 0], advantage=float("nan"))]
    trained = train(
        policy,
        CurrentModel(model),
        ProcessGroup(),
        [bad, rows()],
        Version(0),
        config=a_learner(discrepancy=DiscrepancyConfig(band="off")),
    )
    assert trained.skipped == 1
    assert policy.steps == 1
    assert trained.grad_norm == pytest.approx(trained.grad_norm)


def test_rows_without_sampled_tokens_give_no_gradient(starting_model: Path) -> None:
    model = load(starting_model)
    policy = TrainablePolicy(model, OptimizerConfig(lr=1e-2))
    before = [m.clone() for m in policy.masters]
    empty = [a_row("a", [5, 6, 7], [-1, -1, -1]), a_row("b", [5, 6, 7], [-1, -1, -1])]
    trained = train(
        policy, CurrentModel(model), ProcessGroup(), [empty], Version(0), config=a_learner(micro_batch_tokens=100)
    )
    assert math.isnan(trained.loss)
    assert all(torch.equal(a, b) for a, b in zip(before, policy.masters, strict=True))


def test_the_entropy_bonus_adds_its_share(starting_model: Path) -> None:
    def loss(entropy: float) -> float:
        model = load(starting_model)
        config = a_learner(loss=LossConfig(entropy=entropy))
        policy = TrainablePolicy(model, OptimizerConfig())
        return train(policy, CurrentModel(model), ProcessGroup(), [rows()], Version(0), config=config).loss

    model = load(starting_model)
    mean = 0.0
    count = sum(row.trainable for row in rows())
    for row in rows():
        with torch.no_grad():
            _, entropy = token_logprobs_and_entropy(model, torch.from_numpy(row.tokens)[None].long(), torch.ones(1, 1))
        mean += float(entropy[0, torch.from_numpy(row.versions >= 0)].sum()) / count
    assert loss(0.0) - loss(0.5) == pytest.approx(0.5 * mean, rel=2e-3)


def test_a_version_trained_on_a_cpu_may_trim_the_heap(starting_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    versions: list[HeapTrimmer] = []
    monkeypatch.setattr(HeapTrimmer, "after_version", lambda self: versions.append(self))
    model = load(starting_model)
    train(
        TrainablePolicy(model, OptimizerConfig()), CurrentModel(model), ProcessGroup(), [rows(2), rows(2)], Version(0),
        config=a_learner(),
    )  # fmt: skip
    assert len(versions) == 1
