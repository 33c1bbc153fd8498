"""The snapshot source scores every token with its version's weights, independent of the rest of the batch.

See algorithms.md 18.4 and 18.5.
"""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch

from palimpsest.common.config.learner import OptimizerConfig
from palimpsest.common.config.proximal import MissingPolicy
from palimpsest.common.snapshots.ahead import FetchAhead
from palimpsest.common.snapshots.client import SnapshotClient
from palimpsest.common.user_error import ExitCode, UserError
from palimpsest.common.versions import UNTRAINABLE, Version
from palimpsest.services.learner.batch.batching import Row, pad
from palimpsest.services.learner.model.policy import token_logprobs
from palimpsest.services.learner.model.trainable import TrainablePolicy
from palimpsest.services.learner.model.weights import named_weights, raw_tensors
from palimpsest.services.learner.old_logprobs.missing import MissingCounter
from palimpsest.services.learner.old_logprobs.snapshot_source import SnapshotSource
from palimpsest.services.learner.proximal.types import Exact, Patched
from palimpsest.services.learner.training.state import TrainingState
from tests.learner_parts.models import CPU, canaries, load, logprobs, perturb
from tests.records.builders import a_row

pytestmark = pytest.mark.thorough

VERSIONS = (0, 1, 2)
NOW = Version(2)
MAX_TOKENS = 10_000


class Versions:
    """Three versions in the store, the last one resident, and plain models to compare with."""

    def __init__(self, folder: Path, store: SnapshotClient) -> None:
        self.store = store
        self.loads: list[int] = []
        self.plain = {}
        self.resident = load(folder)
        for version in VERSIONS:
            if version:
                perturb(self.resident, by=0.05, seed=version)
            weights = raw_tensors(named_weights(self.resident))
            store.put("test", Version(version), weights, canaries(self.resident), writer=1)
            self.plain[version] = load(folder)
            self.plain[version].load_state_dict(self.resident.state_dict())
        self.source = SnapshotSource(self.resident, store, CPU, max_tokens=MAX_TOKENS, loaded=self.loads.append)


@pytest.fixture
def versions(starting_model: Path, store: SnapshotClient) -> Versions:
    return Versions(starting_model, store)


def tokens(count: int, seed: int) -> list[int]:
    return torch.randint(3, 250, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def mixed_rows() -> list[Row]:
    return [
        a_row("one version", tokens(9, 1), [-1, -1, 0, 0, 0, -1, 0, 0, 0]),
        a_row("two versions", tokens(12, 2), [-1] * 3 + [0] * 4 + [1] * 5),
        a_row(
            "three versions and a gap", tokens(14, 3), [-1, 0, 0, 1, 1, 1, -1, -1, 2, 2, 2, 2, 2, 2], temperature=0.7
        ),
        a_row("the present version", tokens(10, 4), [-1, 2, 2, 2, 2, 2, 2, 2, 2, 2]),
    ]


def test_every_token_is_scored_by_its_own_version(versions: Versions) -> None:
    rows = mixed_rows()
    (scored,) = versions.source.proximal([pad(rows)], NOW).logprobs
    for i, row in enumerate(rows):
        for version in VERSIONS:
            exact = [0.0, *logprobs(versions.plain[version], row.tokens.tolist(), row.temperature)]
            for t in (row.versions == version).nonzero()[0]:
                assert float(scored[i, t]) == pytest.approx(exact[t], abs=2e-3), f"{row.trajectory}, token {t}"
        assert all(float(scored[i, t]) == 0.0 for t in (row.versions < 0).nonzero()[0])


def test_18_5_a_mixed_batch_equals_one_version_at_a_time_bit_for_bit(versions: Versions) -> None:
    rows = mixed_rows()
    (scored,) = versions.source.proximal([pad(rows)], NOW).logprobs
    for version in VERSIONS:
        own = [row for row in rows if (row.versions == version).any()]
        batch = pad(own)
        with torch.no_grad():
            exact = token_logprobs(
                versions.plain[version], torch.from_numpy(batch.tokens), torch.from_numpy(batch.temperatures)
            )
        for i, row in enumerate(own):
            chosen = torch.from_numpy(row.versions == version).nonzero()[:, 0]
            assert torch.equal(scored[rows.index(row), chosen], exact[i, chosen])


def test_18_5_swapping_the_versions_of_two_rows_swaps_their_values(versions: Versions) -> None:
    same = tokens(8, 5)
    there = [a_row("a", same, [-1] + [0] * 7), a_row("b", same, [-1] + [1] * 7)]
    back = [a_row("a", same, [-1] + [1] * 7), a_row("b", same, [-1] + [0] * 7)]
    (first,) = versions.source.proximal([pad(there)], NOW).logprobs
    (second,) = versions.source.proximal([pad(back)], NOW).logprobs
    assert torch.equal(first, second.flip(0))
    assert not torch.allclose(first[0], first[1], atol=0.05)


def test_18_4_at_staleness_0_the_ratio_is_exactly_1_and_nothing_is_loaded(versions: Versions) -> None:
    batch = pad([a_row("a", tokens(9, 6), [-1] + [2] * 8), a_row("b", tokens(7, 7), [-1] + [2] * 6)])
    (scored,) = versions.source.proximal([batch], NOW).logprobs
    with torch.no_grad():
        current = token_logprobs(
            versions.resident, torch.from_numpy(batch.tokens), torch.from_numpy(batch.temperatures)
        )
    mask = torch.from_numpy(batch.mask)
    assert torch.equal(scored[mask], current[mask])
    assert versions.loads == []


def test_each_version_is_loaded_once_for_all_micro_batches(versions: Versions) -> None:
    batches = [pad([row]) for row in mixed_rows()]
    versions.source.proximal(batches, NOW)
    assert versions.loads == [0, 1]
    versions.source.proximal(batches, NOW)  # the versioned model starts with its resident version
    assert versions.loads == [0, 1, 0]


def test_the_version_that_becomes_old_is_fetched_ahead(versions: Versions, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[tuple[int, int]] = []
    monkeypatch.setattr(FetchAhead, "begin", lambda self, held, target: begun.append((held, target)))
    state = TrainingState(versions.source)
    state.expect(NOW)  # no copy has been needed
    versions.source.proximal([pad(mixed_rows())], NOW)
    state.expect(NOW)
    assert begun == [(1, 2)]


def test_18_5_scoring_does_not_change_the_model_in_training_or_its_optimizer(versions: Versions) -> None:
    policy = TrainablePolicy(versions.resident, OptimizerConfig(lr=1e-3))
    for gradient in policy.gradients():
        gradient.fill_(0.1)
    policy.step()

    def state() -> str:
        tensors = {**policy.state(), **named_weights(versions.resident)}
        return hashlib.sha256(b"".join(t.float().numpy().tobytes() for _, t in sorted(tensors.items()))).hexdigest()

    before = state()
    versions.source.proximal([pad(mixed_rows())], Version(3))
    assert versions.loads == [0, 1, 2]
    assert state() == before


def test_18_5_a_deleted_version_stops_the_run(versions: Versions) -> None:
    batch = pad([a_row("a", tokens(5, 1), [-1, 7, 7, 7, 7])])
    with pytest.raises(UserError, match=r"version 7 is not in the store, .* 4 tokens in 1 trajectory") as error:
        versions.source.proximal([batch], Version(9))
    assert error.value.code is ExitCode.DAMAGED


GONE = a_row("gone", [5, 6, 7, 8, 9, 10], [-1, 0, 7, 7, 8, 2], behavior=[0.0, -1.0, -2.0, -3.0, -4.0, -5.0])


def with_policy(versions: Versions, policy: MissingPolicy, misses: MissingCounter) -> SnapshotSource:
    return SnapshotSource(
        versions.resident, versions.store, CPU, max_tokens=MAX_TOKENS, loaded=lambda _: None, missing=policy,
        misses=misses,
    )  # fmt: skip


def test_18_5_dropping_a_deleted_version_keeps_the_others_exact(versions: Versions) -> None:
    misses = MissingCounter()
    batch = pad([GONE, *mixed_rows()])
    proximal = with_policy(versions, "drop", misses).proximal([batch], NOW)
    (whole,) = (
        with_policy(versions, "fail", MissingCounter()).proximal([pad([kept(GONE), *mixed_rows()])], NOW).logprobs
    )
    assert isinstance(proximal, Exact)
    assert proximal.absent is not None
    assert proximal.absent[0].nonzero().tolist() == [[0, 2], [0, 3], [0, 4]]
    assert torch.equal(proximal.logprobs[0], whole)
    assert misses.tokens == {("version_gone", "drop"): 3}


def test_18_5_a_surrogate_for_a_deleted_version_is_marked(versions: Versions) -> None:
    misses = MissingCounter()
    bypassed = with_policy(versions, "surrogate:bypass", misses).proximal([pad([GONE])], NOW)
    recomputed = with_policy(versions, "surrogate:current_recompute", misses).proximal([pad([GONE])], NOW)
    assert isinstance(bypassed, Patched)
    assert isinstance(recomputed, Patched)
    exact, now = ([0.0, *logprobs(versions.plain[v], GONE.tokens.tolist())] for v in (0, 2))
    assert bypassed.logprobs[0][0].tolist() == pytest.approx([0, exact[1], -2.0, -3.0, -4.0, now[5]], abs=2e-3)
    assert recomputed.logprobs[0][0].tolist() == pytest.approx([0, exact[1], *now[2:]], abs=2e-3)
    for patched in (bypassed, recomputed):
        assert patched.patched[0].tolist() == [[False, False, True, True, True, False]]
    assert misses.tokens == {("version_gone", p): 3 for p in ("surrogate:bypass", "surrogate:current_recompute")}


def test_18_5_a_damaged_version_is_not_treated_as_missing(versions: Versions, tmp_path: Path) -> None:
    """Under every missing policy, data that does not match its digest stops the run."""
    damage(versions.store, tmp_path)
    misses = MissingCounter()
    for policy in get_args(MissingPolicy):
        with pytest.raises(UserError, match="snapshot 1 is damaged"):
            with_policy(versions, policy, misses).proximal([pad(mixed_rows())], NOW)
    assert not misses.tokens


def kept(row: Row) -> Row:
    """The row without tokens of the deleted version."""
    return replace(row, versions=np.where(row.versions > NOW, UNTRAINABLE, row.versions).astype(np.int32))


def test_known_tokens_are_not_scored_again(versions: Versions) -> None:
    """-0.125 is no log-prob of the model, so a returned -0.125 was not recomputed."""
    rows = mixed_rows()
    known = [replace(row, old=np.where(row.versions == 0, np.float32(-0.125), np.float32(np.nan))) for row in rows]
    (values,) = versions.source.proximal([pad(known)], NOW).logprobs
    assert versions.loads == [1]
    (exact,) = versions.source.proximal([pad(rows)], NOW).logprobs
    of = torch.from_numpy(pad(rows).versions)
    assert (values[of == 0] == -0.125).all()
    assert torch.equal(values[of > 0], exact[of > 0])
    assert (values[of < 0] == 0).all()


def test_a_row_with_all_tokens_known_is_left_out_of_the_forward_pass(versions: Versions) -> None:
    rows = [a_row("a", tokens(9, 1), [-1] + [0] * 8), a_row("b", tokens(14, 2), [-1] + [0] * 13)]
    known = replace(rows[1], old=np.full(14, -0.5, dtype=np.float32))
    (values,) = versions.source.proximal([pad([rows[0], known])], NOW).logprobs
    (alone,) = versions.source.proximal([pad(rows[:1])], NOW).logprobs
    assert torch.equal(values[0, :9], alone[0]), "scored in a pass of its own, unpadded"
    assert values[1].tolist() == [0.0] + [-0.5] * 13


def test_18_5_permuting_the_versions_of_tokens_permutes_the_values(versions: Versions) -> None:
    """Each token's value equals a plain pass with its version's weights, whatever the neighboring versions are."""
    same = tokens(10, 8)
    plain = {v: [0.0, *logprobs(model, same)] for v, model in versions.plain.items()}
    generator = torch.Generator().manual_seed(4)
    for _ in range(6):
        of = [-1, *torch.randint(0, 3, (9,), generator=generator).tolist()]
        (values,) = versions.source.proximal([pad([a_row("a", same, of)])], NOW).logprobs
        expected = [0.0 if v < 0 else plain[v][t] for t, v in enumerate(of)]
        assert values[0].tolist() == pytest.approx(expected, abs=2e-3)


def test_a_damaged_snapshot_stops_the_run(versions: Versions, tmp_path: Path, store: SnapshotClient) -> None:
    damage(store, tmp_path)
    with pytest.raises(UserError, match="snapshot 1 is damaged") as error:
        versions.source.proximal([pad(mixed_rows())], NOW)
    assert error.value.code is ExitCode.DAMAGED


def damage(store: SnapshotClient, tmp_path: Path) -> None:
    """Flip one bit of version 1 in the store."""
    held = tmp_path / "store" / "objects" / store.manifest(Version(1)).object
    body = bytearray(held.read_bytes())
    body[len(body) // 2] ^= 1
    held.write_bytes(body)
