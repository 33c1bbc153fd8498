"""The arrays of the loss in a plan are those that the trainer holds."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from palimpsest.common.config.learner import OptimizerConfig
from palimpsest.common.versions import Version
from palimpsest.plan import loss_arrays as arrays_of_loss
from palimpsest.plan.causes import Cause
from palimpsest.plan.learner_memory import RESULTS, learner_memory, pass_shape
from palimpsest.plan.loss_arrays import loss_arrays
from palimpsest.plan.rehearsal import rehearse
from palimpsest.services.learner.batch.batching import PaddedBatch
from palimpsest.services.learner.distributed import ProcessGroup
from palimpsest.services.learner.model.policy import load_model
from palimpsest.services.learner.model.trainable import TrainablePolicy
from palimpsest.services.learner.proximal.surrogates.current_recompute import CurrentRecompute
from palimpsest.services.learner.proximal.types import Exact
from palimpsest.services.learner.training.state import TrainingState
from tests.learner_parts.measured import MeasuredTrainer
from tests.learner_parts.models import CPU
from tests.records.builders import UNCORRECTED, a_learner, a_row

LENGTH, ROWS = 60, 4
TEMPERATURES = 0.02
"""Share of what is not an array [rows, longest row]."""


class OldLogprobs:
    """Exact old log-probs of tokens of the present version, with masks of its own, as SnapshotSource has them."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._recompute = CurrentRecompute(model, CPU)

    def proximal(self, batches: Sequence[PaddedBatch], now: Version, fresh: int = 0) -> Exact:
        made = self._recompute.proximal(batches, now, fresh)
        return Exact(made.logprobs, shared=[mask.clone() for mask in made.shared or ()])


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"discrepancy": UNCORRECTED},
        {"discrepancy": {"band": 1e3, "veto": 1e-6, "weight": "truncated"}, "loss": {"dual_clip": 3.0}},
        {"loss": {"objective": "gspo", "kl": {"weight": 0.1}}},
        {"loss": {"objective": "cispo", "opsm": 0.1, "entropy": 0.01}},
    ],
)
def test_each_cause_is_what_the_trainer_holds(sections: dict[str, Any], layout: str, starting_model: Path) -> None:
    model = load_model(str(starting_model), CPU, "sdpa", layout=layout)
    learner = a_learner(micro_batch_tokens=2 * LENGTH, groups_per_batch=1, layout=layout, **sections)
    start = load_model(str(starting_model), CPU, "sdpa", layout=layout) if learner.loss.kl.weight else None
    state = TrainingState(OldLogprobs(model), start=start)
    policy = TrainablePolicy(model, OptimizerConfig(lr=1e-3))
    trainer = MeasuredTrainer(policy, state, ProcessGroup(), learner, length=LENGTH, seed=0)
    rows = [
        a_row(
            f"r{i}", [3 + (i + t) % 200 for t in range(LENGTH)], [0] * LENGTH, behavior=[-5.5] * LENGTH,
            advantage=(-1.0) ** i,
        )
        for i in range(ROWS)
    ]  # fmt: skip
    trainer.train([rows], Version(1))
    arrays = loss_arrays(learner)
    planned = {f"batch: {name}": size for name, size in arrays.of_batch.items()} | {RESULTS: arrays.of_results}
    held = {name: size for name, size in trainer.held.items() if size}
    assert planned.keys() == held.keys()
    for name, size in held.items():
        assert planned[name] * ROWS * LENGTH == pytest.approx(size, rel=TEMPERATURES), name


def causes(model: Path, *, gpu: bool, **keys: Any) -> dict[str, Cause]:
    learner = a_learner(micro_batch_tokens=2 * LENGTH, groups_per_batch=8, **keys)
    shape = pass_shape(learner, LENGTH, "sdpa")
    memory = learner_memory(learner, rehearse(str(model), shape), shape, ranks=2, samples=ROWS, gpu=gpu)
    return {cause.name: cause for cause in (*memory.held, *memory.moments[1].causes)}


def test_rows_are_divided_among_the_ranks_and_results_on_a_gpu_among_the_minibatches(starting_model: Path) -> None:
    name = f"batch: {arrays_of_loss.ADVANTAGES}"
    whole, parts = (causes(starting_model, gpu=True, minibatches=number) for number in (1, 4))
    assert whole[name].size == parts[name].size == 4 * LENGTH * 8 * ROWS // 2
    assert parts[RESULTS].size == whole[RESULTS].size // 4
    assert "learner.minibatches" in parts[RESULTS].keys
    on_cpu = causes(starting_model, gpu=False, minibatches=4)  # where they stay in the same memory
    assert on_cpu[RESULTS].size == whole[RESULTS].size


def test_a_packed_pass_counts_the_rectangle_of_its_rows(starting_model: Path) -> None:
    learner = a_learner(micro_batch_tokens=2 * LENGTH + 10, groups_per_batch=8, layout="packed")
    shape = pass_shape(learner, LENGTH, "sdpa")
    memory = learner_memory(learner, rehearse(str(starting_model), shape), shape, ranks=1, samples=ROWS, gpu=True)
    (cause,) = (cause for cause in memory.moments[1].causes if cause.name == "loss of one pass")
    assert cause.size == loss_arrays(learner).of_pass * 3 * LENGTH
