"""avg@k and pass@k against values computed by hand, and their properties."""

import itertools
import math
import random

import msgspec
import pytest
from hypothesis import given, strategies as st

from palimpsest.common.evaluation.estimates import (
    Estimate,
    TaskCounts,
    environment_result,
    estimate,
    overall,
    parse_results,
    pass_at_k,
)
from palimpsest.common.evaluation.lines import sentence

COUNTS = st.integers(1, 12).flatmap(
    lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))
)  # samples, successes, k


@pytest.mark.parametrize(
    ("samples", "successes", "k", "expected"),
    [
        (4, 0, 4, 0.0),
        (4, 1, 1, 1 / 4),
        (4, 1, 2, 1 - 3 / 6),  # 3 of the 6 pairs miss the one success
        (4, 2, 2, 1 - 1 / 6),  # one pair consists of the two failures
        (5, 2, 3, 1 - 1 / 10),
        (10, 3, 5, 1 - 21 / 252),  # C(7, 5) / C(10, 5)
        (4, 3, 2, 1.0),
        (3, 3, 1, 1.0),
    ],
)
def test_values_computed_by_hand(samples: int, successes: int, k: int, expected: float) -> None:
    assert pass_at_k(samples, successes, k) == pytest.approx(expected, abs=1e-15)


@given(COUNTS)
def test_pass_at_k_is_the_share_of_subsets_with_a_success(counts: tuple[int, int, int]) -> None:
    samples, successes, k = counts
    outcomes = [True] * successes + [False] * (samples - successes)
    subsets = list(itertools.combinations(outcomes, k))
    assert pass_at_k(samples, successes, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


@given(COUNTS)
def test_pass_at_k_grows_with_k_and_starts_at_the_mean(counts: tuple[int, int, int]) -> None:
    samples, successes, _ = counts
    values = [pass_at_k(samples, successes, k) for k in range(1, samples + 1)]
    assert values[0] == pytest.approx(successes / samples, abs=1e-12)
    assert values == sorted(values)
    assert values[-1] == float(successes > 0)


@given(st.floats(0, 1), st.integers(2, 6))
def test_pass_at_k_is_unbiased(chance: float, samples: int) -> None:
    """Its mean over the binomial distribution of successes is 1 - (1 - p)^k."""
    for k in range(1, samples + 1):
        mean = sum(
            math.comb(samples, c) * chance**c * (1 - chance) ** (samples - c) * pass_at_k(samples, c, k)
            for c in range(samples + 1)
        )
        assert mean == pytest.approx(1 - (1 - chance) ** k, abs=1e-9)


@pytest.mark.parametrize(("samples", "successes", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 5), (4, 2, 0)])
def test_impossible_counts_are_refused(samples: int, successes: int, k: int) -> None:
    with pytest.raises(ValueError, match="k must be 1 to 4"):
        pass_at_k(samples, successes, k)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=40))
def test_the_interval_contains_the_mean_and_is_the_same_again(successes: list[int]) -> None:
    values = [count / 4 for count in successes]
    found = estimate(values)
    assert found is not None
    assert 0.0 <= found.low <= found.value + 1e-12
    assert found.value - 1e-12 <= found.high <= 1.0
    assert found == estimate(values)


def test_an_interval_has_width_even_if_no_task_is_solved() -> None:
    """Wilson's interval of 0 of 32: [0, z^2 / (32 + z^2)]."""
    assert estimate([0.0] * 32) == Estimate(0.0, 0.0, pytest.approx(3.8414588 / 35.8414588, abs=1e-6))
    assert estimate([1.0] * 32) == Estimate(1.0, pytest.approx(1 - 3.8414588 / 35.8414588, abs=1e-6), 1.0)
    assert estimate([]) is None


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    """200 evaluations of 40 tasks whose chances differ: 95 % intervals hold the mean in 92 % of cases at least."""
    rng = random.Random(1)
    inside = 0
    for _ in range(200):
        values = [sum(rng.random() < chance for _ in range(4)) / 4 for chance in (rng.random() for _ in range(40))]
        found = estimate(values)
        assert found is not None
        inside += found.low <= 0.5 <= found.high
    assert inside / 200 >= 0.92


def test_an_environment_counts_tasks_of_which_trajectories_are_missing() -> None:
    result = environment_result([TaskCounts(4, 4, 4.0), TaskCounts(3, 0, 1.5), TaskCounts(0, 0)], k=4)
    assert (result.tasks, result.samples, result.short) == (2, 7, 2)
    assert result.avg is not None
    assert result.avg.value == 0.5
    assert result.passed is not None
    assert result.passed.value == 1.0
    assert result.reward == 0.75


def test_versions_are_compared_by_the_mean_over_environments() -> None:
    solved, none = environment_result([TaskCounts(2, 2)], k=2), environment_result([TaskCounts(0, 0)], k=2)
    assert overall({"a": solved, "b": environment_result([TaskCounts(2, 0)], k=2)}) == 0.5
    assert overall({"a": solved, "b": none}) is None
    assert overall({}) is None


def test_a_line_names_estimates_and_the_best_version() -> None:
    results = {"add": environment_result([TaskCounts(2, 1, 1.0), TaskCounts(2, 1, 1.0)], k=2)}
    line = {"version": 4, "evaluation": msgspec.to_builtins(results), "best": 2}
    assert parse_results(line["evaluation"]) == results
    assert sentence(line) == ("version 4: add avg@2 0.500 [0.095, 0.905], pass@2 1.000 [0.342, 1.000]; best version 2")
