"""All passes over a micro-batch share its tensors; the gradients are those of tensors made for every pass."""

from pathlib import Path

import pytest
import torch

from palimpsest.common.config.learner import OptimizerConfig
from palimpsest.common.config.objective import KlConfig, LossConfig
from palimpsest.common.versions import Version
from palimpsest.services.learner.batch.batching import PaddedBatch, Row, pad
from palimpsest.services.learner.distributed import ProcessGroup
from palimpsest.services.learner.model import device_batch
from palimpsest.services.learner.model.failing_rows import neutral
from palimpsest.services.learner.model.trainable import TrainablePolicy
from palimpsest.services.learner.proximal.surrogates.current_recompute import CurrentRecompute
from tests.learner_parts.models import CPU, load, train
from tests.records.builders import UNCORRECTED, a_learner, a_row


def rows() -> list[Row]:
    made = []
    for i in range(6):
        tokens = torch.randint(3, 250, (8 + 3 * (i % 3),), generator=torch.Generator().manual_seed(i)).tolist()
        versions = [-1, -1] + [0] * (len(tokens) - 2)
        made.append(a_row(f"g{i}/0", tokens, versions, advantage=(-1.0) ** i, behavior=[-5.0] * len(tokens)))
    return made


def gradients(folder: Path) -> list[torch.Tensor]:
    """Gradients of a training with a reference pass, a proximal of later minibatches and a training pass."""
    model, taken = load(folder), []
    policy = TrainablePolicy(model, OptimizerConfig(lr=1e-3))
    step = policy.step

    def record(**named: float) -> float:
        taken.extend(gradient.clone() for gradient in policy.gradients())
        return step(**named)

    policy.step = record  # type: ignore[method-assign]
    config = a_learner(
        discrepancy=UNCORRECTED, micro_batch_tokens=40, minibatches=2, loss=LossConfig(kl=KlConfig(weight=0.1))
    )
    train(
        policy, CurrentRecompute(model, CPU), ProcessGroup(), [rows()[:3], rows()[3:]], Version(0), config=config,
        start=load(folder),
    )  # fmt: skip
    return taken


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> list[PaddedBatch]:
    """Batches whose tensors were made."""
    made: list[PaddedBatch] = []
    original = device_batch._moved
    monkeypatch.setattr(device_batch, "_moved", lambda batch, device: (made.append(batch), original(batch, device))[1])
    return made


def test_gradients_are_bit_equal_with_and_without_the_shared_layout(
    starting_model: Path, moved: list[PaddedBatch], monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = gradients(starting_model)
    once = len(moved)
    assert once == len(set(map(id, moved))), "each micro-batch once for reference, proximal and training"

    class Forgetful(dict):  # type: ignore[type-arg]
        def __setitem__(self, key: object, value: object) -> None:
            return

    original = pad

    def unshared(batch_rows: list[Row]) -> PaddedBatch:
        batch = original(batch_rows)
        object.__setattr__(batch, "on_devices", Forgetful())
        return batch

    monkeypatch.setattr("palimpsest.services.learner.training.trainer.pad", unshared)
    apart = gradients(starting_model)
    assert len(moved) - once > once
    assert len(shared) == len(apart) > 0
    assert all(map(torch.equal, shared, apart))


def test_a_batch_without_its_failing_rows_has_tensors_of_its_own() -> None:
    batch = pad(rows()[:2])
    before = device_batch.on_device(batch, CPU)
    after = device_batch.on_device(neutral(batch, [0]), CPU)
    assert device_batch.on_device(batch, CPU) is before
    assert not after.mask[0].any()
    assert before.mask[0].any()
