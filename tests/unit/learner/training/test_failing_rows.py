"""Rows on which a pass fails, forward or backward, are left out and reported; other errors end the training."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from palimpsest.common.config.learner import OptimizerConfig
from palimpsest.common.versions import Version
from palimpsest.services.learner.batch.batching import Row, pad
from palimpsest.services.learner.distributed import ProcessGroup
from palimpsest.services.learner.model.failing_rows import failing_rows, may_be_of_row
from palimpsest.services.learner.model.trainable import TrainablePolicy
from palimpsest.services.learner.old_logprobs.distributed_scorer import DistributedScorer, model_scorer
from palimpsest.services.learner.old_logprobs.scoring import score
from palimpsest.services.learner.proximal.surrogates.bypass import Bypass
from palimpsest.services.learner.training import passes
from palimpsest.services.learner.training.results import StepResult
from tests.learner_parts.failing_backward import fail_backward
from tests.learner_parts.models import CPU, CurrentModel, load, train
from tests.records.builders import a_learner, a_row

OPTIMIZER = OptimizerConfig(lr=1e-2)
CONFIG = a_learner(discrepancy={"band": "off"})
BEYOND = 10**6
"""No token id of the model: the embedding raises IndexError."""


def rows(*, third: int = 7, advantage: float = 1.0) -> list[Row]:
    """Eight rows; `third` is a token of row r3, and `advantage` its advantage."""
    made = [a_row(f"r{i}", [5, 6, 7, 8 + i], [-1, 0, 0, 0], advantage=(-1.0) ** i * (1 + i)) for i in range(8)]
    made[3] = a_row("r3", [5, 6, third, 8], [-1, 0, 0, 0], advantage=advantage)
    return made


def trained(folder: Path, *minibatches: list[Row], config: Any = CONFIG) -> tuple[StepResult, list[torch.Tensor]]:
    model = load(folder)
    policy = TrainablePolicy(model, OPTIMIZER)
    result = train(policy, CurrentModel(model), ProcessGroup(), list(minibatches), Version(0), config=config)
    return result, [tensor.clone() for tensor in policy.state().values()]


def test_the_other_rows_are_trained_on(starting_model: Path) -> None:
    """A row with advantage 0 has the same place in its batch and no gradient: the weights must be the same, bit by
    bit."""
    result, weights = trained(starting_model, rows(third=BEYOND))
    expected, same = trained(starting_model, rows(advantage=0.0))
    assert list(result.rejected) == ["r3"]
    assert result.rejected["r3"].startswith("IndexError: ")
    assert expected.rejected == {}
    assert all(torch.equal(a, b) for a, b in zip(weights, same, strict=True))
    assert sum(batch.batch.mask.sum() for batch in result.micro_batches) == 21, "the row has no token in the statistics"


def test_of_a_session_the_failing_branch_alone_is_left_out(starting_model: Path) -> None:
    """The other sequences are trained on as if the branch had no trainable token."""
    names = {"r2": "g000000/1", "r3": "g000000/1+1", "r4": "g000000/1+2"}

    def named(made: list[Row]) -> list[Row]:
        return [replace(row, trajectory=names.get(row.trajectory, row.trajectory)) for row in made]

    result, weights = trained(starting_model, named(rows(third=BEYOND)))
    _, same = trained(starting_model, named(rows(advantage=0.0)))
    assert list(result.rejected) == ["g000000/1+1"]
    assert all(torch.equal(a, b) for a, b in zip(weights, same, strict=True))


ONLY = 99
"""A token that one row has."""


@pytest.mark.parametrize("error", [ValueError("no gradient"), None], ids=["exception", "not finite"])
@pytest.mark.parametrize("micro_batch_tokens", [10_000, 8], ids=["one micro-batch", "several"])
def test_a_row_that_fails_only_in_the_backward_pass_is_left_out(
    starting_model: Path, error: Exception | None, micro_batch_tokens: int
) -> None:
    """The gradients of the other micro-batches are complete then: they must not count twice."""
    config = a_learner(discrepancy={"band": "off"}, micro_batch_tokens=micro_batch_tokens)
    model = load(starting_model)
    policy = TrainablePolicy(model, OPTIMIZER)
    fail_backward(model, ONLY, error)
    result = train(
        policy, CurrentModel(model), ProcessGroup(), [rows(third=ONLY), rows()[:2]], Version(0), config=config
    )
    expected, same = trained(starting_model, rows(advantage=0.0), rows()[:2], config=config)
    assert list(result.rejected) == ["r3"]
    assert result.rejected["r3"] == (
        "NotFinite: the gradient is not finite" if error is None else "ValueError: no gradient"
    )
    assert all(torch.equal(a, b) for a, b in zip(policy.state().values(), same, strict=True))
    assert (result.loss, result.skipped, policy.steps) == (expected.loss, 0, 2)


def test_without_the_guard_a_failing_backward_pass_ends_the_training(
    starting_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passes, "may_be_of_row", lambda _: False)
    model = load(starting_model)
    policy = TrainablePolicy(model, OPTIMIZER)
    fail_backward(model, ONLY, ValueError("no gradient"))
    with pytest.raises(ValueError, match="no gradient"):
        train(policy, CurrentModel(model), ProcessGroup(), [rows(third=ONLY)], Version(0), config=CONFIG)


def test_a_row_of_a_later_minibatch_fails_after_the_first_step(starting_model: Path) -> None:
    """With the behavior log-probs as proximal no pass precedes the one of the minibatch."""
    config = a_learner(proximal={"kind": "bypass"}, discrepancy={"band": "off"})
    model = load(starting_model)
    policy = TrainablePolicy(model, OPTIMIZER)
    bad = [a_row("late", [5, BEYOND, 7], [-1, 0, 0]), a_row("fine", [5, 6, 7], [-1, 0, 0])]
    result = train(policy, Bypass(CPU), ProcessGroup(), [rows(), bad], Version(0), config=config)
    assert list(result.rejected) == ["late"]
    assert policy.steps == 2


@pytest.mark.parametrize(
    ("error", "of_machine"),
    [(torch.OutOfMemoryError("no room"), True), (MemoryError(), True), (RuntimeError("CUDA error: assert"), True),
     (RuntimeError("every pass fails"), False)],
)  # fmt: skip
def test_other_errors_stay_errors(starting_model: Path, error: Exception, of_machine: bool) -> None:
    model = load(starting_model)
    policy = TrainablePolicy(model, OPTIMIZER)

    def fail(*_: object) -> None:
        raise error

    model.get_input_embeddings().register_forward_pre_hook(fail)
    assert may_be_of_row(error) is not of_machine
    with pytest.raises(type(error)) as raised:
        train(policy, CurrentModel(model), ProcessGroup(), [rows()], Version(0), config=CONFIG)
    assert raised.value is error


def test_every_failing_row_is_found(starting_model: Path) -> None:
    model = load(starting_model)
    batch = pad([a_row(f"r{i}", [5, BEYOND if i in (0, 4, 5) else 6, 7], [-1, 0, 0]) for i in range(7)])
    assert sorted(failing_rows(model_scorer(model, CPU), batch)) == [0, 4, 5]


def test_scores_of_failing_rows_are_unknown(starting_model: Path) -> None:
    """The scorer of the learner gives NaN, which counts as unscorable; so does the scorer of a replica."""
    model = load(starting_model)
    made = rows(third=BEYOND)
    (values,) = DistributedScorer(ProcessGroup(), model_scorer(model, CPU))([pad(made)])
    assert [i for i in range(8) if np.isnan(values[i]).any()] == [3]
    scored = {row.trajectory: found for part in score(model, made, device=CPU, batch_tokens=64) for row, found in part}
    assert [name for name, found in scored.items() if np.isnan(found).any()] == ["r3"]
    assert np.array_equal(scored["r2"], values[2])
