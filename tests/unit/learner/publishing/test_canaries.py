"""The canaries of a version: their tokens, and the weights that score them."""

from pathlib import Path

import pytest
import torch

from palimpsest.services.learner.batch.batching import Row
from palimpsest.services.learner.publishing.canaries import MOST_TOKENS, Canaries
from tests.learner_parts.models import CPU, load, logprobs, perturb
from tests.records.builders import a_row


def rows(count: int, length: int = 10) -> list[Row]:
    generator = torch.Generator().manual_seed(7)
    return [
        a_row(
            f"g{i:03}/0",
            torch.randint(3, 250, (length,), generator=generator).tolist(),
            [-1, -1, -1, 0, 0, -1, 0, *[-1] * (length - 7)],
            temperature=0.5,
        )
        for i in range(count)
    ]


def test_without_a_batch_the_canary_is_one_fixed_sequence(starting_model: Path) -> None:
    (canary,) = Canaries(load(starting_model), CPU, trajectories=4).made()
    (again,) = Canaries(load(starting_model), CPU, trajectories=4).made()
    assert canary == again
    assert canary.positions == tuple(range(1, 64))
    assert canary.previous == ()
    assert canary.logprobs == pytest.approx(logprobs(load(starting_model), list(canary.tokens)), abs=0.05)


def test_rows_of_the_batch_are_scored_before_and_after_the_step(starting_model: Path) -> None:
    model = load(starting_model)
    canaries = Canaries(model, CPU, trajectories=4)
    batch = rows(12)
    canaries.choose(batch)
    perturb(model, by=0.05, seed=1)
    made = canaries.made()
    assert [canary.tokens for canary in made] == [tuple(batch[i].tokens.tolist()) for i in (0, 3, 6, 9)]
    for canary in made:
        assert canary.positions == (3, 4, 6), "the sampled tokens only"
        tokens = list(canary.tokens)
        for weights, values in ((load(starting_model), canary.previous), (model, canary.logprobs)):
            exact = logprobs(
                weights, tokens
            )  # canaries use temperature 1, independent of the row's sampling temperature
            assert values == pytest.approx([exact[p - 1] for p in canary.positions], abs=2e-3)


def test_the_next_batch_replaces_the_previous_one(starting_model: Path) -> None:
    canaries = Canaries(load(starting_model), CPU, trajectories=2)
    canaries.choose(rows(4))
    canaries.choose(rows(4)[1:2])
    assert [canary.tokens for canary in canaries.made()] == [tuple(rows(4)[1].tokens.tolist())]


@pytest.mark.thorough
def test_canaries_are_few_and_short(starting_model: Path) -> None:
    canaries = Canaries(load(starting_model), CPU, trajectories=32)
    canaries.choose(rows(6, length=MOST_TOKENS // 4))
    made = canaries.made()
    assert len(made) == 4
    assert sum(len(canary.tokens) for canary in made) <= MOST_TOKENS


def test_a_batch_of_only_long_rows_leaves_the_fixed_sequence(starting_model: Path) -> None:
    canaries = Canaries(load(starting_model), CPU, trajectories=4)
    canaries.choose(rows(1, length=MOST_TOKENS + 1))
    (canary,) = canaries.made()
    assert canary.positions == tuple(range(1, 64))
