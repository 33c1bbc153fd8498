"""The canaries that go with a version: which tokens, and under which weights."""

from pathlib import Path
from typing import Any

import pytest
import torch

from palimpsest.services.learner.batch.batching import Row
from palimpsest.services.learner.model.policy import decoder_of
from palimpsest.services.learner.publishing.canaries import (
    MOST_TOKENS,
    SAMPLE_LENGTH,
    SAMPLES,
    WINDOW,
    Canaries,
    window,
)
from tests.learner_parts.models import CPU, load, logprobs, perturb
from tests.records.builders import a_row


def rows(count: int, length: int = 10, *, start: int = 3) -> list[Row]:
    """Rows with sampled tokens start, start + 1 and start + 3."""
    generator = torch.Generator().manual_seed(7)
    versions = [-1] * length
    for sampled in (start, start + 1, start + 3):
        versions[sampled] = 0
    return [
        a_row(f"g{i:03}/0", torch.randint(3, 250, (length,), generator=generator).tolist(), versions, temperature=0.5)
        for i in range(count)
    ]


def a_maker(model: Any, *, trajectories: int = 4, micro_batch_tokens: int = 4096) -> Canaries:
    return Canaries(model, CPU, trajectories=trajectories, micro_batch_tokens=micro_batch_tokens)


def float32_logprobs(model: Any, tokens: list[int]) -> list[float]:
    return logprobs(model.float(), tokens)


def test_before_any_batch_the_model_samples_them_itself(starting_model: Path) -> None:
    made, again = a_maker(load(starting_model)).made(), a_maker(load(starting_model)).made()
    assert made == again
    assert len(made) == SAMPLES
    likely = []
    for canary in made:
        assert canary.positions == tuple(range(1, SAMPLE_LENGTH + 1))
        assert canary.previous == ()
        assert canary.logprobs == pytest.approx(logprobs(load(starting_model), list(canary.tokens)), abs=0.05)
        likely += list(canary.float32)
    uniform = -torch.tensor(float(load(starting_model).config.vocab_size)).log()  # type: ignore[union-attr]
    assert sum(likely) / len(likely) > uniform / 2, "samples of the model, not random ids"


def test_rows_of_the_batch_are_scored_before_and_after_the_step(starting_model: Path) -> None:
    model = load(starting_model)
    canaries = a_maker(model)
    batch = rows(12)
    canaries.choose(batch)
    perturb(model, by=0.05, seed=1)
    made = canaries.made()
    assert [canary.tokens for canary in made] == [tuple(batch[i].tokens[:7].tolist()) for i in (0, 3, 6, 9)]
    for canary in made:
        assert canary.positions == (3, 4, 6), "the sampled tokens only"
        tokens = list(canary.tokens)  # at temperature 1, whatever the row was sampled at
        low, high = logprobs(model, tokens), float32_logprobs(perturbed(starting_model), tokens)
        before = float32_logprobs(load(starting_model), tokens)
        assert canary.logprobs == pytest.approx([low[p - 1] for p in canary.positions], abs=2e-3)
        assert canary.float32 == pytest.approx([high[p - 1] for p in canary.positions], abs=1e-5)
        assert canary.previous == pytest.approx([before[p - 1] for p in canary.positions], abs=1e-5)
        assert canary.float32 != canary.logprobs


def perturbed(folder: Path) -> Any:
    model = load(folder)
    perturb(model, by=0.05, seed=1)
    return model


def test_the_next_batch_replaces_the_last(starting_model: Path) -> None:
    canaries = a_maker(load(starting_model), trajectories=2)
    canaries.choose(rows(4))
    canaries.choose(rows(4)[1:2])
    assert [canary.tokens for canary in canaries.made()] == [tuple(rows(4)[1].tokens[:7].tolist())]


def test_rows_of_any_length_give_canaries_within_the_limits(starting_model: Path) -> None:
    """A row of 9,000 tokens, too, in passes of at most micro_batch_tokens."""
    canaries = a_maker(load(starting_model), trajectories=32, micro_batch_tokens=2 * WINDOW)
    canaries.choose(rows(6, length=9_000, start=8_900))
    made = canaries.made()
    assert len(made) == MOST_TOKENS // WINDOW
    assert all(len(canary.tokens) == WINDOW for canary in made)
    assert all(canary.positions == (WINDOW - 4, WINDOW - 3, WINDOW - 1) for canary in made)
    assert all(len(canary.previous) == len(canary.float32) == len(canary.logprobs) == 3 for canary in made)


def test_passes_obey_micro_batch_tokens(starting_model: Path) -> None:
    model = load(starting_model)
    canaries = a_maker(model, trajectories=8, micro_batch_tokens=40)
    shapes: list[tuple[int, ...]] = []
    decoder_of(model).register_forward_pre_hook(
        lambda _, arguments, keywords: shapes.append(tuple(keywords["input_ids"].shape)), with_kwargs=True
    )
    canaries.choose(rows(8, length=16, start=10))
    assert shapes == [(2, 14)] * 4


def test_a_batch_without_trainable_tokens_leaves_the_samples(starting_model: Path) -> None:
    canaries = a_maker(load(starting_model))
    canaries.choose([a_row("g0/0", [5, 6, 7], [-1, -1, -1])])
    assert len(canaries.made()) == SAMPLES


def test_a_window_ends_with_the_last_trainable_token_and_compares_none_without_context() -> None:
    row = a_row("g0/0", list(range(10)), [-1, 0, 0, -1, 0, 1, 1, -1, -1, -1])
    part = window(row, 4)
    assert part is not None
    assert part.tokens.tolist() == [3, 4, 5, 6]
    assert part.versions.tolist() == [-1, 0, 1, 1]
    single = window(row, 2)
    assert single is not None
    assert single.versions.tolist() == [-1, 1]
    assert window(row, 1) is None
    assert row.versions.tolist() == [-1, 0, 0, -1, 0, 1, 1, -1, -1, -1], "the row itself stays"
