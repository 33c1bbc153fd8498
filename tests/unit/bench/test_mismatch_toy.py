"""The toy: its log-probs against an independent implementation, its staleness, and its sampling."""

import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from bench.mismatch.references import REFERENCES, Stored, source
from bench.mismatch.toy import Batch, Store, Toy, Weights, new_policy, rounded, sample
from bench.mismatch.training import Run, Trainer, current_logprobs, judge, train
from palimpsest.common.versions import UNTRAINABLE, Version
from palimpsest.services.learner.observability.surrogate_error import Thresholds
from tests.oracles import toy_gru

SMALL = Toy(hidden=12, window=3, versions=8)
MAIN = Thresholds(band=1.2, clip_low=0.2, clip_high=0.2)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Use one thread, as the program does: more threads than free cores wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def trained(toy: Toy, versions: int) -> Trainer:
    """Return a trainer after this number of versions, each trained with exact old log-probs."""
    trainer = Trainer(toy, seed=3)
    exact = Stored(trainer.store)
    for _ in range(versions):
        batch = trainer.sample()
        proximal = exact.proximal(batch.minibatches, trainer.now)
        for place, minibatch in enumerate(batch.minibatches):
            current = current_logprobs(trainer.policy, minibatch)
            trainer.step(minibatch, judge(minibatch, current, proximal, place, MAIN))
        trainer.publish()
    return trainer


@pytest.fixture(scope="module")
def late() -> tuple[Trainer, Batch]:
    """A trainer, and a batch with tokens of every staleness."""
    trainer = trained(SMALL, 5)
    return trainer, trainer.sample()


def as_float64(weights: Weights) -> dict[str, NDArray[np.float64]]:
    return {name: weight.double().numpy() for name, weight in weights.items()}


def test_old_log_probs_are_of_the_version_that_sampled_each_token(late: tuple[Trainer, Batch]) -> None:
    trainer, batch = late
    weights = {version: as_float64(kept) for version, kept in trainer.store.trained.items()}
    old = Stored(trainer.store).proximal(batch.minibatches, trainer.now)
    compared = set()
    for minibatch, logprobs in zip(batch.minibatches, old.logprobs, strict=True):
        for row, place in np.argwhere(minibatch.mask):
            version = Version(int(minibatch.versions[row, place]))
            expected = toy_gru.token_logprob(weights[version], minibatch.tokens[row].tolist(), place)
            assert float(logprobs[row, place]) == pytest.approx(expected, abs=2e-5)
            compared.add(trainer.now - version)
        assert not logprobs[~torch.from_numpy(minibatch.mask)].any()
    assert compared == {0, 1, 2, 3}


def test_behavior_log_probs_are_of_the_rounded_weights(late: tuple[Trainer, Batch]) -> None:
    trainer, batch = late
    rough = {
        version: {name: toy_gru.rounded(weight, SMALL.levels) for name, weight in as_float64(kept).items()}
        for version, kept in trainer.store.trained.items()
    }
    for minibatch in batch.minibatches:
        for row, place in np.argwhere(minibatch.mask):
            weights = rough[Version(int(minibatch.versions[row, place]))]
            expected = toy_gru.token_logprob(weights, minibatch.tokens[row].tolist(), place)
            assert minibatch.behavior[row, place] == pytest.approx(expected, abs=2e-5)


def test_without_rounding_there_is_no_discrepancy() -> None:
    trainer = trained(dataclasses.replace(SMALL, levels=0), 4)
    batch = trainer.sample()
    old = Stored(trainer.store).proximal(batch.minibatches, trainer.now)
    for minibatch, logprobs in zip(batch.minibatches, old.logprobs, strict=True):
        np.testing.assert_allclose(logprobs.numpy()[minibatch.mask], minibatch.behavior[minibatch.mask], atol=2e-6)


def test_rounded_weights_have_at_most_the_given_number_of_values() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        tensor = torch.randn(7, 9, generator=generator, dtype=torch.float64)
        coarse = rounded(tensor, 16)
        np.testing.assert_allclose(coarse.numpy(), toy_gru.rounded(tensor.numpy(), 16), atol=1e-12)
        assert len(coarse.unique()) <= 16


def test_18_4_at_staleness_0_every_ratio_of_the_first_minibatch_is_1() -> None:
    trainer = trained(dataclasses.replace(SMALL, window=0), 3)
    batch = trainer.sample()
    first = batch.minibatches[0]
    assert set(np.unique(first.versions)) == {UNTRAINABLE, 3}
    old = Stored(trainer.store).proximal(batch.minibatches, trainer.now)
    judged = judge(first, current_logprobs(trainer.policy, first), old, 0, MAIN)
    np.testing.assert_allclose(judged.outcome.log_update.numpy(), 0.0, atol=2e-6)
    assert not judged.clipped.any()


def test_staleness_is_uniform_and_half_of_the_rows_have_two_versions() -> None:
    toy = Toy(hidden=4, window=3, prompts=64)
    policy = new_policy(toy, 0)
    store = Store(policy, window=toy.window, levels=0)
    for version in range(6):
        store.publish(Version(version), policy)
    batch = sample(store, toy, Version(5), np.random.default_rng(0))
    versions = np.concatenate([minibatch.versions for minibatch in batch.minibatches])
    assert (versions[:, : toy.length] == UNTRAINABLE).all()
    halves = versions[:, toy.length : toy.length + 2], versions[:, toy.length + 2 :]
    assert all((half[:, :1] == half).all() for half in halves)
    older, newer = (half[:, 0] for half in halves)
    assert (older <= newer).all()
    assert (older < newer).sum() == toy.rows // 2
    counts = np.bincount((5 - versions[versions != UNTRAINABLE]).astype(int))
    assert len(counts) == 4
    assert counts.min() > 0.85 * counts.mean()


def test_the_reward_is_the_share_of_reversed_letters(late: tuple[Trainer, Batch]) -> None:
    _, batch = late
    tokens = np.concatenate([minibatch.tokens for minibatch in batch.minibatches])
    matches = [[row[7 - i] == row[i] for i in range(4)] for row in tokens.tolist()]
    assert batch.rewards.tolist() == [sum(row) / 4 for row in matches]
    assert 0 < batch.rewards.mean() < 1


def test_letters_are_sampled_with_their_probability() -> None:
    toy = Toy(hidden=8, window=0, prompts=1, group=4000, minibatches=1, letters=4)
    policy = new_policy(toy, 1)
    store = Store(policy, window=0, levels=0)
    store.publish(Version(0), policy)
    batch = sample(store, toy, Version(0), np.random.default_rng(0)).minibatches[0]
    first = np.bincount(batch.tokens[:, toy.length], minlength=4) / 4000
    scores = policy(torch.from_numpy(batch.tokens[:1, : toy.length])).logits[0, -1]
    np.testing.assert_allclose(first, scores.softmax(-1).detach().numpy(), atol=0.03)


def test_a_version_outside_the_window_is_deleted() -> None:
    policy = new_policy(SMALL, 0)
    store = Store(policy, window=2, levels=16)
    for version in range(4):
        store.publish(Version(version), policy)
    assert sorted(store.trained) == sorted(store.sampling) == [1, 2, 3]
    with pytest.raises(KeyError):
        store.policy(Version(0))


def test_a_published_version_does_not_change_with_the_policy() -> None:
    policy = new_policy(SMALL, 0)
    store = Store(policy, window=1, levels=16)
    store.publish(Version(0), policy)
    before = store.trained[Version(0)]["head"].clone()
    with torch.no_grad():
        policy.head.add_(1.0)
    assert torch.equal(store.policy(Version(0)).head, before)


def test_runs_of_one_seed_have_the_same_first_batch_and_are_repeatable() -> None:
    toy = dataclasses.replace(SMALL, versions=3)
    rewards = {name: train(Run(toy, name, MAIN, seed=1)).rewards for name in ("exact", "bypass", "linear_prox")}
    assert len({run[0] for run in rewards.values()}) == 1
    assert train(Run(toy, "exact", MAIN, seed=1)).rewards == rewards["exact"]
    assert train(Run(toy, "exact", MAIN, seed=2)).rewards != rewards["exact"]


def test_every_reference_gives_finite_losses() -> None:
    trainer = Trainer(SMALL, seed=0)
    batch = trainer.sample()
    for name in REFERENCES:
        reference = source(name, store=trainer.store, policy=trainer.policy, toy=SMALL)
        proximal = reference.proximal(batch.minibatches, trainer.now)
        judged = judge(batch.minibatches[0], current_logprobs(trainer.policy, batch.minibatches[0]), proximal, 0, MAIN)
        assert judged.outcome.losses.isfinite().all()
    with pytest.raises(KeyError):
        source("none", store=trainer.store, policy=trainer.policy, toy=SMALL)


def test_the_toy_is_small() -> None:
    assert sum(parameter.numel() for parameter in new_policy(Toy(), 0).parameters()) < 100_000
