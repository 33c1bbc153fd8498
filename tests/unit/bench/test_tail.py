"""The simulation of lognormal tool times, in virtual time: what each rule for batches trains on and loses."""

from dataclasses import replace
from functools import cache

import pytest

from bench.simulated_tail import Load, Rule, figures, simulate
from bench.tail import rules

LOAD = Load(groups_per_batch=4, samples=2, tokens=16, versions=150, warm_up=20)


@cache
def of(name: str) -> dict[str, float]:
    return figures(simulate(LOAD, rules(LOAD)[name]))


def test_masking_loses_as_few_tokens_of_slow_trajectories_as_of_fast_ones_at_full_throughput() -> None:
    masked, former = of("masked"), of("former")
    assert masked["lost_token_share_slowest_tenth"] <= 1.5 * masked["lost_token_share"] + 1e-3
    assert masked["lost_token_share"] <= 0.01
    assert masked["versions_per_median_duration"] >= 0.95 * former["versions_per_median_duration"]
    assert masked["trained_tokens_per_median_duration"] >= 0.95 * former["trained_tokens_per_median_duration"]
    assert masked["dropped_share_slowest_tenth"] == 0.0


def test_whole_trajectory_drops_lose_the_slowest_tenth() -> None:
    former = of("former")
    assert former["dropped_share_slowest_tenth"] > 0.9 > 4 * former["dropped_share"]
    assert former["lost_token_share_slowest_tenth"] > 4 * former["lost_token_share"]


def test_strict_order_trains_on_every_token_at_a_fraction_of_the_throughput() -> None:
    strict = of("strict")
    assert strict["trained_token_share"] == 1.0
    assert strict["versions_per_median_duration"] < 0.5 * of("former")["versions_per_median_duration"]


def test_the_bound_on_overtaking_holds_for_every_trajectory() -> None:
    """The oldest token of a trajectory is trained on or masked at most S + W / B versions after the offer."""
    batches = 2
    outcome = simulate(LOAD, Rule(batches * LOAD.groups_per_batch))
    ages = [one.trained_at - one.versions[0] for one in outcome.resolved if one.trained_at is not None]
    assert LOAD.max_staleness < max(ages) <= LOAD.max_staleness + batches
    unbounded = simulate(LOAD, Rule(None)).resolved
    assert max(one.trained_at - one.versions[0] for one in unbounded if one.trained_at is not None) > max(ages)


def test_adaptive_admission_lowers_the_staleness_of_a_slow_learner_at_its_throughput() -> None:
    load = replace(LOAD, train=2.0)
    full, adaptive = (figures(simulate(load, Rule(None, adaptive=adaptive))) for adaptive in (False, True))
    assert adaptive["staleness_mean"] < full["staleness_mean"] - 0.5
    assert adaptive["versions_per_median_duration"] >= 0.99 * full["versions_per_median_duration"]
    assert adaptive["trained_tokens_per_median_duration"] >= 0.99 * full["trained_tokens_per_median_duration"]


def test_adaptive_admission_changes_nothing_where_the_learner_waits() -> None:
    assert figures(simulate(LOAD, Rule(None, adaptive=True))) == of("masked")


@pytest.mark.parametrize("name", ["masked", "former"])
def test_a_simulation_is_deterministic(name: str) -> None:
    assert figures(simulate(LOAD, rules(LOAD)[name])) == of(name)
