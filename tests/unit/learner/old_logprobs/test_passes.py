"""The layout of the passes for old log-probs: hand-counted, and a function of the trajectories alone."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from palimpsest.common.snapshots.client import SnapshotClient
from palimpsest.common.versions import UNTRAINABLE, Version
from palimpsest.services.learner.batch.batching import PaddedBatch, Row, pad
from palimpsest.services.learner.model.policy import token_logprobs
from palimpsest.services.learner.old_logprobs import passes
from palimpsest.services.learner.old_logprobs.passes import BatchScores
from palimpsest.services.learner.old_logprobs.snapshot_source import SnapshotSource
from palimpsest.services.learner.proximal.surrogates.current_recompute import CurrentRecompute
from palimpsest.services.learner.proximal.types import NO_PASS, TRAINING_PASS, Exact
from tests.learner_parts.models import CPU, canaries, load, perturb
from tests.learner_parts.passes import Passes, count_passes
from tests.records.builders import a_row

NOW = Version(3)
ALL = 100_000


@pytest.fixture
def run(starting_model: Path, store: SnapshotClient) -> tuple[torch.nn.Module, SnapshotClient]:
    """The weights of version 3, and a store with versions 0 to 3."""
    from palimpsest.services.learner.model.weights import named_weights, raw_tensors

    model = load(starting_model)
    for version in range(NOW + 1):
        perturb(model, by=0.05, seed=version)
        store.put("test", Version(version), raw_tensors(named_weights(model)), canaries(model), writer=1)
    return model, store


def a_row_of(name: str, *versions: int, each: int = 5) -> Row:
    """A prompt of two tokens, then `each` tokens of every version."""
    of = [UNTRAINABLE] * 2 + [version for version in versions for _ in range(each)]
    draw = random.Random(name)
    return a_row(name, [draw.randrange(3, 250) for _ in of], of)


def scored(
    run: tuple[torch.nn.Module, SnapshotClient], batches: list[PaddedBatch], monkeypatch: pytest.MonkeyPatch, *,
    fresh: int = 0, max_tokens: int = ALL,
) -> tuple[Exact, Passes]:  # fmt: skip
    seen = count_passes(monkeypatch)
    source = SnapshotSource(*run, CPU, max_tokens=max_tokens, loaded=lambda _: None)
    proximal = source.proximal(batches, NOW, fresh)
    assert isinstance(proximal, Exact)
    return proximal, seen


@pytest.mark.parametrize(
    ("versions", "tokens"),
    [
        ([0], 7),  # one pass over the row
        ([3], 0),  # the training pass
        ([1, 2], 7 + 12),
        ([2, 3], 7),  # one less
        ([0, 1, 2], 7 + 12 + 17),
        ([0, 1, 2, 3], 7 + 12 + 17),
    ],
)
def test_a_row_of_several_versions_costs_what_the_formula_gives(
    run: tuple[torch.nn.Module, SnapshotClient], versions: list[int], tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt of 2 and 5 tokens of each of W versions: (W + 1) / 2 of a long row, one less if the last is present."""
    row = a_row_of("g0/0", *versions)
    proximal, seen = scored(run, [pad([row])], monkeypatch, fresh=1)
    assert (seen.tokens, seen.rows) == (tokens, len(set(versions) - {NOW}))
    assert proximal.passes is not None
    own = proximal.passes[0][0]
    assert (own[row.versions == NOW] == TRAINING_PASS).all()
    assert (own[row.versions < 0] == NO_PASS).all()
    assert (own[(row.versions >= 0) & (row.versions < NOW)] >= 0).all()


def test_the_rows_of_all_micro_batches_share_the_passes_of_a_version(
    run: tuple[torch.nn.Module, SnapshotClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four rows in two micro-batches, the second of a later minibatch: one pass for version 1, and one for the present
    version, whose tokens in the second minibatch no training pass scores in time."""
    batches = [pad([a_row_of("g0/0", 1), a_row_of("g0/1", 1, 3)]), pad([a_row_of("g1/0", 1), a_row_of("g1/1", 3)])]
    proximal, seen = scored(run, batches, monkeypatch, fresh=1)
    assert proximal.passes is not None
    assert seen.shapes == [(3, 7), (1, 7)]
    assert [sorted(set(own.ravel().tolist())) for own in proximal.passes] == [[-2, -1, 0], [-1, 0, 1]]
    assert proximal.shared is not None
    assert not proximal.shared[1].any(), "after a step the training pass is of other weights"


def test_every_value_equals_a_full_pass_over_the_same_rows_bit_for_bit(
    run: tuple[torch.nn.Module, SnapshotClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of 2 to 5 runs, several micro-batches: each pass equals plain scoring of its rows, all tokens, at once."""
    draw = random.Random(3)
    rows = [a_row_of(f"g{i}/0", *sorted(draw.choices(range(4), k=1 + i % 4)), each=1 + i % 5) for i in range(9)]
    batches = [pad(rows[:4]), pad(rows[4:])]
    proximal, seen = scored(run, batches, monkeypatch, max_tokens=40)
    assert proximal.passes is not None
    assert len(seen.batches) > 4
    checked = 0
    for number, (model, batch) in enumerate(zip(seen.weights, seen.batches, strict=True)):
        with torch.no_grad():
            plain = token_logprobs(model, torch.from_numpy(batch.tokens), torch.from_numpy(batch.temperatures))
        place_of = {row.trajectory: i for i, row in enumerate(batch.rows)}
        for of_batch, values, own in zip(batches, proximal.logprobs, proximal.passes, strict=True):
            for index, row in enumerate(of_batch.rows):
                (chosen,) = np.nonzero(own[index] == number)
                if len(chosen):
                    assert torch.equal(values[index, chosen], plain[place_of[row.trajectory], chosen])
                    checked += len(chosen)
    assert checked == sum(row.trainable for row in rows)


def test_the_layout_depends_on_the_trajectories_alone(
    run: tuple[torch.nn.Module, SnapshotClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [a_row_of(f"g{i}/0", i % 3, 1 + i % 3, each=1 + i) for i in range(6)]

    def layout(order: list[int], cut: int) -> dict[str, list[float]]:
        batches = [pad([rows[i] for i in order[:cut]]), pad([rows[i] for i in order[cut:]])]
        proximal, _ = scored(run, batches, monkeypatch, max_tokens=30)
        return {
            row.trajectory: values[i, : len(row.tokens)].tolist()
            for batch, values in zip(batches, proximal.logprobs, strict=True)
            for i, row in enumerate(batch.rows)
        }

    expected = layout([0, 1, 2, 3, 4, 5], 3)
    for order, cut in (([5, 4, 3, 2, 1, 0], 2), ([2, 0, 4, 1, 5, 3], 5)):
        assert layout(order, cut) == expected


def test_current_recompute_makes_no_pass_for_the_first_minibatch(
    run: tuple[torch.nn.Module, SnapshotClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = run
    batches = [pad([a_row_of("g0/0", 1)]), pad([a_row_of("g1/0", 2)])]
    seen = count_passes(monkeypatch)
    source = CurrentRecompute(model, CPU)
    proximal = source.proximal(batches, NOW, 2)
    assert seen.rows == 0
    current = torch.full(batches[0].tokens.shape, -0.25)
    mask = torch.from_numpy(batches[0].mask)
    assert torch.equal(proximal.anchor(0, current, mask).logprobs, torch.where(mask, current, 0.0))
    assert source.proximal(batches, NOW, 1).logprobs[1].any()
    assert seen.rows == 1


def test_a_row_is_cut_after_its_last_wanted_token() -> None:
    row = a_row("a", [5, 6, 7, 8, 9], [-1, 1, 2, 1, 2])
    cut = passes.cut_row(row, np.array([False, True, False, False, False, False]))
    assert (cut.tokens.tolist(), cut.versions.tolist(), cut.old) == ([5, 6], [-1, 1], None)
    assert not BatchScores([pad([row])], CPU, max_tokens=ALL, fresh=0).shared[0].any()
