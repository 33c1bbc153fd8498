"""Distributions, slopes, effective sample sizes, and caps, compared with counts per token."""

import math

import numpy as np
import pytest

from palimpsest.services.learner.observability.effective_samples import capped_weights, effective_sample_sizes
from palimpsest.services.learner.observability.histograms import EDGES, GROUPS, QUANTILES, group, summarize_distribution
from palimpsest.services.learner.observability.staleness_slope import Point, fit_staleness_slope, slope
from palimpsest.services.learner.observability.token_statistics import Tokens
from tests.oracles import batch as oracle

DRAWS = 200


def tokens(
    behavior: np.ndarray, proximal: np.ndarray, current: np.ndarray, *, missing: np.ndarray | None = None
) -> Tokens:
    """Tokens with log-probs only."""
    zeros, no = np.zeros(len(behavior)), np.zeros(len(behavior), dtype=bool)
    return Tokens(
        staleness=zeros.astype(np.int32), behavior=behavior, proximal=proximal, current=current, old=zeros,
        entropy=zeros, advantages=zeros, masked=no, clipped=no, causes={"missing": no if missing is None else missing},
    )  # fmt: skip


def test_a_distribution_equals_a_count_per_value() -> None:
    for seed in range(DRAWS):
        generator = np.random.default_rng(seed)
        values = generator.normal(0, generator.choice([0.01, 0.1, 1.0, 3.0]), int(generator.integers(1, 300)))
        values[: len(values) // 5] = generator.choice(
            EDGES, len(values) // 5
        )  # a value on an edge belongs to the upper bin
        got = summarize_distribution(values)
        assert got is not None
        assert got["bins"] == oracle.bins(list(values))
        assert sum(got["bins"]) == len(values)
        expected = [oracle.quantile(list(values), percent / 100) for percent in QUANTILES]
        assert got["quantiles"] == pytest.approx(expected, rel=1e-9, abs=1e-12)
        assert got["mean_abs"] == pytest.approx(math.fsum(map(abs, values)) / len(values))


def test_an_empty_array_has_no_distribution() -> None:
    assert summarize_distribution(np.zeros(0)) is None


def test_every_staleness_has_a_label() -> None:
    assert [group(staleness) for staleness in range(12)] == ["0", "1", "2", *["3-4"] * 2, *["5-8"] * 4, *[">8"] * 3]
    assert {group(staleness) for staleness in range(12)} == set(GROUPS)


def test_a_slope_equals_least_squares_over_single_tokens() -> None:
    for seed in range(DRAWS):
        generator = np.random.default_rng(seed)
        ages = generator.integers(0, 4, int(generator.integers(1, 80)))
        masked = generator.random(len(ages)) < 0.1 + 0.1 * ages
        points = [
            Point(float(age), float((ages == age).sum()), float(masked[ages == age].mean())) for age in np.unique(ages)
        ]
        assert slope(points) == pytest.approx(oracle.line(list(ages), list(masked)), abs=1e-9)


def test_one_staleness_has_no_slope() -> None:
    assert slope([Point(2.0, 100.0, 0.5)]) is None
    assert slope([Point(2.0, 100.0, 0.5), Point(3.0, 0.0, 0.9)]) is None
    assert fit_staleness_slope([[Point(2.0, 100.0, 0.5)]]) is None
    assert fit_staleness_slope([[Point(2.0, 100.0, 0.5), Point(3.0, 5.0, 0.9)]], least_tokens=30) is None


def test_a_slope_is_fitted_within_versions() -> None:
    """Three versions whose level falls as their data gets staler, while each rises by .1 per staleness."""
    batches = [
        [Point(age, 50.0, 1.0 - base + 0.1 * (age - base)) for age in (base, base + 1.0)] for base in (0.0, 1.0, 2.0)
    ]
    found = fit_staleness_slope(batches)
    assert found is not None
    assert found.slope == pytest.approx(0.1)
    assert found.errors > 1e6
    assert found.versions == 3
    together = slope([point for points in batches for point in points])
    assert together is not None
    assert together < -0.5


def test_the_standard_error_of_a_slope_follows_from_the_versions() -> None:
    """Slopes .2, 0, .1 of versions of equal weight: mean .1, standard error sqrt(.02 * 3 / 2) / 3."""
    batches = [[Point(0.0, 40.0, 0.0), Point(1.0, 40.0, step)] for step in (0.2, 0.0, 0.1)]
    found = fit_staleness_slope(batches)
    assert found is not None
    assert found.slope == pytest.approx(0.1)
    assert found.errors == pytest.approx(0.1 / (math.sqrt(0.02 * 3 / 2) / 3))
    assert found.level == pytest.approx(0.05)
    one = fit_staleness_slope(batches[:1])
    assert one is not None
    assert one.errors == 0.0


def test_effective_shares_of_example_c() -> None:
    """algorithms.md, example C: weights 1, 1, 1, 5 give .5714, truncated at 2 they give .8929."""
    log = np.log([1.0, 1.0, 1.0, 5.0])
    four = tokens(np.full(4, -2.0), -2.0 + log, -2.0 + log)
    got = effective_sample_sizes(four, np.minimum(np.exp(log), 2.0), np.arange(4), by_total=False)
    assert got["tokens_raw"] == got["sequences_raw"] == pytest.approx(64 / 28 / 4)
    assert got["tokens_used"] == got["sequences_used"] == pytest.approx(25 / 7 / 4)


def test_effective_shares_equal_a_count_by_hand() -> None:
    for seed in range(DRAWS):
        generator = np.random.default_rng(seed)
        count = int(generator.integers(3, 60))
        behavior = -generator.exponential(1.0, count)
        proximal = behavior + generator.normal(0, 0.2, count)
        current = proximal + generator.normal(0, 0.2, count)
        trajectory = np.sort(generator.choice([2, 5, 7, 11], count))
        weight = np.where(generator.random(count) < 0.2, 0.0, np.minimum(np.exp(proximal - behavior), 1.1))
        weight[0] = 1.0
        total, used = np.exp(current - behavior), weight * np.exp(current - proximal)
        each = [np.flatnonzero(trajectory == name) for name in np.unique(trajectory)]
        expected = {
            "tokens_raw": oracle.ess(list(total)),
            "tokens_used": oracle.ess(list(used)),
            "sequences_raw": oracle.ess([math.prod(total[i]) for i in each]),
            "sequences_used": oracle.ess([math.fsum(used[i]) / len(i) for i in each]),
        }
        four = tokens(behavior, proximal, current)
        assert effective_sample_sizes(four, weight, trajectory, by_total=False) == pytest.approx(expected), (
            f"seed {seed}"
        )
        by_total = effective_sample_sizes(four, np.sign(weight), trajectory, by_total=True)
        assert by_total["tokens_used"] == pytest.approx(oracle.ess(list(total * (weight > 0))))


def test_18_8_a_token_without_a_log_prob_has_no_weight() -> None:
    three = tokens(np.full(3, -1.0), np.array([-1.0, -1.0, np.nan]), np.array([-1.0, -1.0, -1.0]))
    got = effective_sample_sizes(three, np.array([1.0, 1.0, 0.0]), np.zeros(3, dtype=int), by_total=False)
    assert got["tokens_used"] == pytest.approx(2 / 3)
    assert got["sequences_raw"] == 1.0
    nothing = tokens(np.zeros(0), np.zeros(0), np.zeros(0))
    assert all(
        math.isnan(v)
        for v in effective_sample_sizes(nothing, np.zeros(0), np.zeros(0, dtype=int), by_total=False).values()
    )


def test_caps_are_counted_at_tokens_where_they_bind() -> None:
    behavior = np.full(6, -2.0)
    apart = np.log([3.0, 1.9, 1.0, 0.6, 0.4, 9.0])
    six = tokens(behavior, behavior + apart, behavior, missing=np.zeros(6, dtype=bool))
    weight = np.array([2.0, 1.9, 1.0, 0.6, 0.5, 0.0])  # the last token is masked
    at = np.arange(6)
    assert capped_weights(six, weight, at, low=0.5, high=2.0, of_sequence=False) == {"low": 1, "high": 1}
    assert capped_weights(six, weight, at, low=None, high=2.0, of_sequence=False) == {"low": 0, "high": 1}
    assert capped_weights(six, weight, at, low=None, high=None, of_sequence=False) is None


def test_a_cap_of_a_trajectory_counts_for_all_its_kept_tokens() -> None:
    behavior = np.full(5, -2.0)
    apart = np.log([1.5, 1.6, 1.0, 1.9, 0.3])
    five = tokens(behavior, behavior + apart, behavior)
    weight = np.array([2.0, 2.0, 0.0, 0.57, 0.57])
    trajectory = np.array([0, 0, 0, 1, 1])  # products 2.4 and .57
    assert capped_weights(five, weight, trajectory, low=0.6, high=2.0, of_sequence=True) == {"low": 2, "high": 2}
