"""Layout of micro-batches, padding, and partition by rank."""

import itertools

import numpy as np
from hypothesis import given, strategies as st

from palimpsest.services.learner.batch.batching import (
    PASS_TOKENS,
    RECTANGLE_ENTRIES,
    micro_batches,
    pad,
    partition_by_rank,
    versions_present,
)
from tests.records.builders import a_row

lengths = st.lists(st.integers(2, 40), min_size=1, max_size=30)


def rows_of(sizes: list[int]) -> list:
    return [a_row(f"r{i:03d}", list(range(n)), [-1] + [i % 3] * (n - 1)) for i, n in enumerate(sizes)]


@given(lengths, st.integers(10, 200))
def test_every_row_is_in_one_micro_batch_within_the_budget(sizes: list[int], budget: int) -> None:
    batches = micro_batches(rows_of(sizes), max_tokens=budget)
    assert sorted(row.trajectory for batch in batches for row in batch) == [f"r{i:03d}" for i in range(len(sizes))]
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(len(row.tokens) for row in batch) <= budget


@given(st.lists(st.integers(1, 900), min_size=1, max_size=9), st.integers(10, 3000))
def test_no_other_split_costs_less(sizes: list[int], budget: int) -> None:
    """Oracle: every way to cut the rows, sorted by length, into lists."""
    batches = micro_batches(rows_of(sizes), max_tokens=budget)
    ordered = sorted(sizes)
    costs = []
    for cuts in itertools.product([False, True], repeat=len(ordered) - 1):
        edges = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), len(ordered)]
        lists = [ordered[a:b] for a, b in itertools.pairwise(edges)]
        if all(len(each) == 1 or len(each) * each[-1] <= budget for each in lists):
            costs.append(sum(len(each) * each[-1] + PASS_TOKENS for each in lists))
    assert sum(len(rows) * max(len(row.tokens) for row in rows) + PASS_TOKENS for rows in batches) == min(costs)


def test_a_pass_is_split_where_that_saves_more_padding_than_a_pass_costs() -> None:
    """100 rows of 10 tokens beside one of 13 are 300 tokens of padding; beside one of 12, only 200."""
    assert [len(rows) for rows in micro_batches(rows_of([10] * 100 + [13]), max_tokens=10_000)] == [100, 1]
    assert [len(rows) for rows in micro_batches(rows_of([10] * 100 + [12]), max_tokens=10_000)] == [101]


@given(lengths, st.randoms(use_true_random=False))
def test_the_layout_does_not_depend_on_the_order_of_arrival(sizes: list[int], random) -> None:
    for packed in (False, True):
        rows = rows_of(sizes)
        before = [[row.trajectory for row in batch] for batch in micro_batches(rows, max_tokens=100, packed=packed)]
        random.shuffle(rows)
        after = [[row.trajectory for row in batch] for batch in micro_batches(rows, max_tokens=100, packed=packed)]
        assert after == before


@given(lengths, st.integers(10, 200))
def test_packed_micro_batches_count_no_padding_for_the_limit(sizes: list[int], budget: int) -> None:
    batches = micro_batches(rows_of(sizes), max_tokens=budget, packed=True)
    assert sorted(row.trajectory for batch in batches for row in batch) == [f"r{i:03d}" for i in range(len(sizes))]
    assert all(len(batch) == 1 or sum(len(row.tokens) for row in batch) <= budget for batch in batches)
    assert len(batches) <= len(micro_batches(rows_of(sizes), max_tokens=budget))


@given(st.lists(st.integers(1, 900), min_size=1, max_size=9), st.integers(10, 3000))
def test_no_other_split_of_packed_rows_costs_less(sizes: list[int], budget: int) -> None:
    """Oracle: every way to cut the rows, sorted by length, into lists."""
    ordered = sorted(sizes)

    def cost(each: list[int]) -> int:
        return len(each) * each[-1] + PASS_TOKENS * RECTANGLE_ENTRIES

    costs = []
    for cuts in itertools.product([False, True], repeat=len(ordered) - 1):
        edges = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), len(ordered)]
        lists = [ordered[a:b] for a, b in itertools.pairwise(edges)]
        if all(len(each) == 1 or sum(each) <= budget for each in lists):
            costs.append(sum(map(cost, lists)))
    batches = micro_batches(rows_of(sizes), max_tokens=budget, packed=True)
    assert sum(cost([len(row.tokens) for row in rows]) for rows in batches) == min(costs)


def test_packed_rows_of_unequal_length_share_a_pass() -> None:
    """100 rows of 10 tokens beside one of 140: 1,140 tokens, and 14,140 entries of a rectangle."""
    assert [len(rows) for rows in micro_batches(rows_of([10] * 100 + [140]), max_tokens=1140, packed=True)] == [101]
    assert [len(rows) for rows in micro_batches(rows_of([10] * 100 + [140]), max_tokens=1139, packed=True)] == [100, 1]


def test_padding_is_on_the_right_and_untrainable() -> None:
    padded = pad([a_row("a", [5, 6], [-1, 2], behavior=[0.0, -0.5]), a_row("b", [7, 8, 9], [-1, 3, 3], advantage=-2.0)])
    assert padded.tokens.tolist() == [[5, 6, 0], [7, 8, 9]]
    assert padded.versions.tolist() == [[-1, 2, -1], [-1, 3, 3]]
    assert padded.mask.tolist() == [[False, True, False], [False, True, True]]
    assert padded.behavior.tolist() == [[0.0, -0.5, 0.0], [-1.0, -1.0, -1.0]]
    assert padded.advantages.tolist() == [[1.0] * 3, [-2.0] * 3]
    assert padded.temperatures.shape == (2, 1)


def test_versions_present_are_listed_once_in_ascending_order() -> None:
    rows = [a_row("a", [1, 2, 3], [-1, 4, 5]), a_row("b", [1, 2], [-1, 5]), a_row("c", [1, 2], [-1, -1])]
    assert versions_present(rows) == [4, 5]
    assert versions_present([]) == []


@given(lengths, st.integers(1, 5))
def test_every_row_goes_to_one_rank_and_shares_are_balanced(sizes: list[int], ranks: int) -> None:
    shares = partition_by_rank(rows_of(sizes), ranks)
    assert sorted(row.trajectory for share in shares for row in share) == [f"r{i:03d}" for i in range(len(sizes))]
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    tokens = [sum(len(row.tokens) for row in share) for share in shares]
    assert max(tokens) - min(tokens) <= max(sizes)


def test_a_row_counts_its_trainable_tokens() -> None:
    assert a_row("a", [1, 2, 3, 4], [-1, 0, -1, 1]).trainable == 2
    assert np.array_equal(a_row("a", [1, 2], [-1, 0]).versions, [-1, 0])
