"""ppo_ewma_async: a moving average whose decay follows the staleness and that can be reset (algorithms.md 4.7)."""

import itertools
import math
from typing import Literal

import numpy as np
import pytest
import torch
from safetensors.torch import load as load_tensors, save as save_tensors
from torch import Tensor

from palimpsest.common.versions import Version
from palimpsest.services.learner.proximal.surrogates.ppo_ewma_async import PpoEwmaAsync
from palimpsest.services.learner.proximal.surrogates.reset_rule import Cause, Rule
from tests.learner_parts.models import CPU
from tests.oracles import surrogates as oracle

OFF = Rule("off", threshold=0.9, patience=3, cooldown=8)
PAPER = Rule("paper", threshold=0.9, patience=3, cooldown=8)
GUARDED = Rule("guarded", threshold=0.95, patience=2, cooldown=3)


def source(window: int | Literal["measured"], rule: Rule = OFF, *, start: float = 0.0) -> PpoEwmaAsync:
    """Return a source over a model of three weights; other tests run forward passes of a real model."""
    model = torch.nn.Linear(3, 1, bias=False)
    return PpoEwmaAsync(model, theta(start), CPU, window=window, rule=rule)


def theta(value: float) -> list[Tensor]:
    return [torch.full((1, 3), float(value))]


def state_is_equal(a: PpoEwmaAsync, b: PpoEwmaAsync) -> bool:
    """Compare two states bit for bit; NaN equals NaN."""
    mine, its = a.state(), b.state()
    return mine.keys() == its.keys() and all(
        torch.equal(torch.nan_to_num(mine[name], -7.0), torch.nan_to_num(its[name], -7.0)) for name in mine
    )


@pytest.mark.parametrize(("window", "decay"), [(0, 0.0), (1, 1 / 3), (4, 2 / 3), (8, 0.8), (16, 0.8889)])
def test_18_3_a_fixed_window_gives_a_fixed_beta(window: int, decay: float) -> None:
    average = source(window)
    for version in range(1, 80):
        average.published(theta(version), active_share=1.0, mean_staleness=float(version))
        assert average.decay == pytest.approx(decay, abs=5e-5)
        assert average.average.center_of_mass == pytest.approx(
            oracle.center_of_mass(average.decay, version + 1) if window else 0.0, abs=1e-9
        )
    assert average.average.center_of_mass == pytest.approx(window / 2, abs=0.1)


@pytest.mark.thorough
def test_a_measured_window_equals_the_oracle() -> None:
    changes = 0
    for seed in range(200):
        generator = np.random.default_rng(seed)
        measured = (generator.uniform(0, 6) * np.minimum(1, np.arange(40) / 10) + generator.random(40)).tolist()
        expected = oracle.paces(measured)
        thetas = generator.normal(0, 1, 41).astype(np.float32).astype(np.float64)
        average = source("measured", start=float(thetas[0]))
        for t, staleness in enumerate(measured):
            average.published(theta(float(thetas[t + 1])), active_share=1.0, mean_staleness=staleness)
            assert average.decay == pytest.approx(expected[t], rel=1e-9, abs=1e-12), f"seed {seed}, version {t}"
        means, weights, ages = oracle.averages([np.array(value) for value in thetas], expected)
        assert float(average.average.means[0][0, 0]) == pytest.approx(float(means[-1]), abs=2e-6)
        assert average.average.weight == pytest.approx(weights[-1], rel=1e-9)
        assert average.average.center_of_mass == pytest.approx(ages[-1], rel=1e-9)
        changes += len(set(expected))
    assert changes > 500


def test_a_measured_window_converges_to_the_staleness() -> None:
    average = source("measured")
    for version in range(200):
        average.published(theta(version), active_share=1.0, mean_staleness=3.0)
    assert average.mean_staleness == pytest.approx(3.0)
    assert average.decay == pytest.approx(0.75)
    assert average.average.center_of_mass == pytest.approx(3.0, abs=1e-6)


def test_beta_does_not_change_before_the_average_has_converged() -> None:
    average = source("measured")
    betas = []
    for version in range(1, 60):
        average.published(theta(version), active_share=1.0, mean_staleness=version / 10)
        betas.append(average.decay)
    since, held = 0, []
    for before, after in itertools.pairwise(betas):
        since += 1
        if after != before:
            held.append((since, before / (1 - before)))
            since = 0
    assert len(held) > 5
    assert all(versions >= math.ceil(3 * mass - 1e-9) for versions, mass in held)


def test_unknown_staleness_is_left_out() -> None:
    average = source("measured")
    average.published(theta(1), active_share=1.0, mean_staleness=1.0)
    average.published(theta(2), active_share=1.0, mean_staleness=math.nan)
    assert average.mean_staleness == 1.0
    with pytest.raises(ValueError, match=r"mean staleness is -1\.0"):
        average.published(theta(3), active_share=1.0, mean_staleness=-1.0)
    with pytest.raises(ValueError, match="active share is 2"):
        average.published(theta(3), active_share=2.0, mean_staleness=1.0)
    assert average.average.means[0].tolist() != theta(3)[0].tolist()
    assert average.average.versions == 3


def test_the_papers_reset_restarts_from_the_current_weights() -> None:
    average = source(4, PAPER)
    for version in range(1, 4):
        average.published(theta(version), active_share=0.9, mean_staleness=2.0)
    assert average.average.means[0].tolist() != theta(3)[0].tolist()
    average.published(theta(7), active_share=0.89, mean_staleness=2.0)
    assert average.average.means[0].tolist() == theta(7)[0].tolist()
    assert (average.average.weight, average.average.center_of_mass, average.average.versions) == (1.0, 0.0, 1)
    assert average.resets == {Cause.BELOW_THRESHOLD: 1, Cause.BELOW_HEALTHY_LEVEL: 0}
    average.published(theta(8), active_share=1.0, mean_staleness=2.0)
    assert float(average.average.means[0][0, 0]) == pytest.approx((8 + 2 / 3 * 7) / (5 / 3))  # with the old beta


def guarded(stored: dict[int, float], *, trigger: Literal["active", "mask"] = "active") -> PpoEwmaAsync:
    """A guarded source over a store with these versions; its threshold is met two versions after the start."""
    rule = Rule("guarded", threshold=0.95, patience=1, cooldown=3, trigger=trigger)
    model = torch.nn.Linear(3, 1, bias=False)
    return PpoEwmaAsync(
        model, theta(0), CPU, window=4, rule=rule,
        load=lambda version: theta(stored[version]) if version in stored else None,
    )  # fmt: skip


def test_a_guarded_reset_starts_from_the_stored_version_as_old_as_the_mean_staleness() -> None:
    """Version 10 with a mean staleness of 2.4: the average restarts from version 10 - 3 with an age of 3."""
    average = guarded({7: 70.0})
    average.published(theta(90), active_share=1.0, mean_staleness=2.4, version=Version(9))
    average.published(theta(100), active_share=0.5, mean_staleness=2.4, version=Version(10))
    assert average.resets[Cause.BELOW_HEALTHY_LEVEL] == 1
    assert average.average.means[0].unique().tolist() == [70.0]
    assert (average.average.center_of_mass, average.average.weight, average.average.versions) == (3.0, 1.0, 1)


def test_a_guarded_reset_without_the_stored_version_starts_from_the_current_weights() -> None:
    average = guarded({})
    average.published(theta(90), active_share=1.0, mean_staleness=2.4, version=Version(9))
    average.published(theta(100), active_share=0.5, mean_staleness=2.4, version=Version(10))
    assert average.average.means[0].unique().tolist() == [100.0]
    assert average.average.center_of_mass == 0.0


def test_with_the_trigger_mask_clipped_tokens_do_not_cause_a_reset() -> None:
    average = guarded({}, trigger="mask")
    average.published(theta(1), active_share=1.0, mean_staleness=0.0, unmasked_share=1.0, version=Version(1))
    average.published(theta(2), active_share=0.1, mean_staleness=0.0, unmasked_share=1.0, version=Version(2))
    assert not any(average.resets.values())
    average.published(theta(3), active_share=0.1, mean_staleness=0.0, unmasked_share=0.5, version=Version(3))
    assert average.resets[Cause.BELOW_HEALTHY_LEVEL] == 1


def test_a_guarded_reset_is_counted_under_its_cause() -> None:
    average = source(4, GUARDED)
    for share in (0.8, 0.8, 0.7, 0.7):
        average.published(theta(1), active_share=share, mean_staleness=2.0)
    assert average.resets == {Cause.BELOW_THRESHOLD: 0, Cause.BELOW_HEALTHY_LEVEL: 1}
    assert average.state()["healthy"].tolist()[:2] == pytest.approx([0.8, 0.8])


@pytest.mark.parametrize("window", [4, "measured"])
@pytest.mark.parametrize("rule", [OFF, PAPER, GUARDED], ids=lambda rule: rule.reset)
def test_18_3_a_checkpoint_at_any_version_continues_bit_for_bit(window: int | Literal["measured"], rule: Rule) -> None:
    generator = np.random.default_rng(7)
    updates = [
        (theta(v), float(generator.choice([0.97, 0.8, 0.5])), float(generator.uniform(0, 4))) for v in range(30)
    ]  # fmt: skip

    def update(average: PpoEwmaAsync, versions: range) -> None:
        for v in versions:
            masters, active_share, mean_staleness = updates[v]
            average.published(masters, active_share=active_share, mean_staleness=mean_staleness)

    for stop in (0, 1, 5, 12, 20):
        uninterrupted, other = source(window, rule), source(window, rule, start=9.0)
        update(uninterrupted, range(stop))
        other.restore(load_tensors(save_tensors(uninterrupted.state())))
        for v in range(stop, 30):
            update(uninterrupted, range(v, v + 1))
            update(other, range(v, v + 1))
            assert state_is_equal(uninterrupted, other), f"cut at {stop}, version {v}"
            assert (uninterrupted.decay, uninterrupted.resets) == (other.decay, other.resets)


def test_18_3_a_rank_that_receives_the_state_stays_equal() -> None:
    """The state always has the same shape, so another rank's state can overwrite it in place."""
    first, second = source("measured", GUARDED), source("measured", GUARDED, start=5.0)
    for share in (0.9, 0.5, 0.5, 0.9):
        first.published(theta(2), active_share=share, mean_staleness=1.5)
    received = second.state()
    for name, tensor in first.state().items():
        received[name].copy_(tensor)
    second.restore(received)
    assert state_is_equal(first, second)
    for version in range(20):
        for average in (first, second):
            average.published(theta(version), active_share=0.6, mean_staleness=2.5)
        assert state_is_equal(first, second)


def test_a_checkpoint_without_the_average_or_of_another_surrogate_is_refused() -> None:
    average = source(4)
    with pytest.raises(ValueError, match="resuming would reset the average"):
        average.restore({})
    with pytest.raises(ValueError, match="lacks healthy, pace, resets"):
        average.restore(average.average.state())
    with pytest.raises(ValueError, match="is of another"):
        average.average.restore(average.state())


def test_a_changed_window_applies_after_a_restart() -> None:
    before, after = source(4), source(8)
    before.published(theta(1), active_share=1.0, mean_staleness=1.0)
    after.restore(before.state())
    assert after.decay == pytest.approx(0.8)
    assert torch.equal(after.average.means[0], before.average.means[0])
