"""Exact old log-probs: every token under its own version, whatever else is in the batch (algorithms.md 18.4, 18.5)."""

import hashlib
from pathlib import Path

import pytest
import torch

from common.config.learner import OptimizerConfig
from common.refusal import ExitCode, Refusal
from common.snapshots.client import SnapshotClient
from common.versions import Version
from services.learner.batching import Row, pad
from services.learner.model import Trainee, named_weights, raw_tensors, token_logprobs
from services.learner.old.snapshot import SnapshotSource
from tests.builders import a_row
from tests.models import CPU, canaries, load, logprobs, perturb

VERSIONS = (0, 1, 2)
NOW = Version(2)


class Versions:
    """Three versions in the store, the last of them resident; plain models to compare with."""

    def __init__(self, folder: Path, store: SnapshotClient) -> None:
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
        self.source = SnapshotSource(self.resident, store, CPU, loaded=self.loads.append)


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


def test_a_mixed_batch_gives_the_bits_of_one_version_at_a_time(versions: Versions) -> None:
    rows = mixed_rows()
    (scored,) = versions.source.proximal([pad(rows)], NOW).logprobs
    for version in VERSIONS:
        own = [row for row in rows if (row.versions == version).any()]
        batch = pad(own)
        with torch.no_grad():
            exact, _ = token_logprobs(
                versions.plain[version], torch.from_numpy(batch.tokens), torch.from_numpy(batch.temperatures)
            )
        for i, row in enumerate(own):
            chosen = torch.from_numpy(row.versions == version).nonzero()[:, 0]
            assert torch.equal(scored[rows.index(row), chosen], exact[i, chosen])


def test_swapping_the_versions_of_two_rows_swaps_their_values(versions: Versions) -> None:
    same = tokens(8, 5)
    there = [a_row("a", same, [-1] + [0] * 7), a_row("b", same, [-1] + [1] * 7)]
    back = [a_row("a", same, [-1] + [1] * 7), a_row("b", same, [-1] + [0] * 7)]
    (first,) = versions.source.proximal([pad(there)], NOW).logprobs
    (second,) = versions.source.proximal([pad(back)], NOW).logprobs
    assert torch.equal(first, second.flip(0))
    assert not torch.allclose(first[0], first[1], atol=0.05)


def test_at_staleness_0_the_ratio_is_exactly_1_and_nothing_is_loaded(versions: Versions) -> None:
    batch = pad([a_row("a", tokens(9, 6), [-1] + [2] * 8), a_row("b", tokens(7, 7), [-1] + [2] * 6)])
    (scored,) = versions.source.proximal([batch], NOW).logprobs
    with torch.no_grad():
        current, _ = token_logprobs(
            versions.resident, torch.from_numpy(batch.tokens), torch.from_numpy(batch.temperatures)
        )
    mask = torch.from_numpy(batch.mask)
    assert torch.equal(scored[mask], current[mask])
    assert versions.loads == []


def test_each_version_is_loaded_once_for_all_micro_batches(versions: Versions) -> None:
    batches = [pad([row]) for row in mixed_rows()]
    versions.source.proximal(batches, NOW)
    assert versions.loads == [0, 1]
    versions.source.proximal(batches, NOW)  # the shadow starts with the version it has
    assert versions.loads == [0, 1, 0]


def test_the_model_in_training_and_its_optimizer_stay_as_they_are(versions: Versions) -> None:
    trainee = Trainee(versions.resident, OptimizerConfig(lr=1e-3))
    for gradient in trainee.gradients():
        gradient.fill_(0.1)
    trainee.step()

    def state() -> str:
        tensors = {**trainee.state(), **named_weights(versions.resident)}
        return hashlib.sha256(b"".join(t.float().numpy().tobytes() for _, t in sorted(tensors.items()))).hexdigest()

    before = state()
    versions.source.proximal([pad(mixed_rows())], Version(3))
    assert versions.loads == [0, 1, 2]
    assert state() == before


def test_a_version_that_is_gone_stops_the_run_and_is_never_replaced(versions: Versions) -> None:
    with pytest.raises(Refusal, match="version 7 is not in the store") as refusal:
        versions.source.proximal([pad([a_row("a", tokens(5, 1), [-1, 7, 7, 7, 7])])], Version(9))
    assert refusal.value.code is ExitCode.DAMAGED


def test_a_damaged_snapshot_stops_the_run(versions: Versions, tmp_path: Path, store: SnapshotClient) -> None:
    held = tmp_path / "store" / "objects" / store.manifest(Version(1)).object
    body = bytearray(held.read_bytes())
    body[len(body) // 2] ^= 1
    held.write_bytes(body)
    with pytest.raises(Refusal, match="snapshot 1 is damaged") as refusal:
        versions.source.proximal([pad(mixed_rows())], NOW)
    assert refusal.value.code is ExitCode.DAMAGED
