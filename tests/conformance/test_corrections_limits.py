"""Limits computed over a minibatch: M2PO's threshold and the mean weight (algorithms.md 5, 6.3, 18.12)."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from palimpsest.services.learner.corrections import Gather, Limits, Rules, correct, limits
from palimpsest.services.learner.corrections.m2po import m2_rule, m2_threshold
from tests.learner_parts.corrections import ALL, alone_on_its_machine, corrected, joined, on_ranks, row, tensors
from tests.oracles.corrections import draw, m2_kept

DRAWS = 300


def kept_under(threshold: float, values: torch.Tensor) -> list[bool]:
    usable = torch.ones(1, len(values), dtype=torch.bool)
    return (~m2_rule(values[None], usable, threshold))[0].tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_the_threshold_removes_the_same_values_as_the_oracle(dtype: torch.dtype) -> None:
    outcomes = {"all": 0, "some": 0, "none": 0}
    for seed in range(DRAWS):
        generator = np.random.default_rng(seed)
        values = generator.normal(0, 0.5, int(generator.integers(1, 30)))
        if seed % 3 == 0:  # ties, and values that are their own opposites
            values = generator.choice([-1.0, -0.5, 0.25, 0.5, 1.0, 2.0], size=len(values))
        bound = float(generator.choice([0.02, 0.04, 0.2, 0.25, 1.0]))
        ours = torch.tensor(values, dtype=dtype)
        threshold = m2_threshold(ours, bound, gather=alone_on_its_machine)
        expected = m2_kept(ours.double().numpy() ** 2, bound)
        assert kept_under(threshold, ours) == expected.tolist(), f"seed {seed}"
        outcomes["all" if expected.all() else "some" if expected.any() else "none"] += 1
        kept = ours.double()[torch.tensor(expected)] ** 2
        assert len(kept) == 0 or float(kept.mean()) < bound
    assert min(outcomes.values()) >= 10, outcomes


@pytest.mark.parametrize(
    ("values", "bound", "kept"),
    [
        ([0.1, 0.2, 3.0], 0.03, [True, True, False]),
        ([0.1, 0.2, 3.0], 100.0, [True, True, True]),
        ([0.1, -0.5, 0.5], 0.1, [True, False, False]),  # (0.01 + 0.25) / 2 is above: both equal values are removed
        ([0.5, 0.5], 0.25, [False, False]),  # the mean must be below, not on the bound
        ([0.5, 0.1], 0.011, [False, True]),  # the smallest satisfies the bound
        ([0.0, 0.0, 9.0], 1e-9, [True, True, False]),
        ([], 1.0, []),
    ],
)
def test_m2po_by_hand(values: list[float], bound: float, kept: list[bool]) -> None:
    ours = torch.tensor(values, dtype=torch.float64)
    assert kept_under(m2_threshold(ours, bound, gather=alone_on_its_machine), ours) == kept


def test_equal_squares_on_the_bound_are_removed_together_despite_rounding() -> None:
    """Ten equal squares: rounding puts their running mean above, on or below the value."""
    for value in np.linspace(0.1, 0.9, 41):
        ours = torch.full((10,), float(value), dtype=torch.float64)
        threshold = m2_threshold(ours, float(value) ** 2, gather=alone_on_its_machine)
        assert kept_under(threshold, ours) == [False] * 10


def test_m2po_masks_tokens_and_records_the_cause() -> None:
    got = row([0.1, 0.2, 3.0], m2=0.03, weight="ratio")
    assert got.causes["m2"].tolist() == got.masked.tolist() == [[False, False, True]]


def test_m2po_without_its_threshold_is_refused() -> None:
    mask = torch.ones(1, 1, dtype=torch.bool)
    with pytest.raises(ValueError, match="limits"):
        correct(torch.zeros(1, 1), torch.zeros(1, 1), mask, missing=~mask, rules=Rules(m2=0.1), limits=Limits())


@pytest.mark.parametrize("weight", ["ratio", "truncated"])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_18_12_limits_do_not_depend_on_the_split_of_the_minibatch(ranks: int, weight: str) -> None:
    """Threshold and normalizer are equal for all micro-batches and ranks, including ranks without rows."""
    rules = Rules(weight=weight, weight_normalize=True, **{**ALL, "m2": 0.03})  # type: ignore[arg-type]
    bound_somewhere = 0
    for seed in range(0, 40, 4):
        parts = [draw(seed + i) for i in range(4)]
        whole = limits([tensors(joined(parts))], rules, gather=alone_on_its_machine)
        first = ranks - 1 if seed % 8 == 0 else 0  # with 3 ranks and first = 2, ranks 0 and 1 have nothing

        def work(rank: int, gather: Gather, parts: list[Any] = parts, first: int = first) -> Limits:
            share = parts[rank - first :: ranks - first] if rank >= first else []
            return limits([tensors(part) for part in share], rules, gather=gather)

        got = on_ranks(ranks, work)
        assert got == [got[0]] * ranks
        assert got[0].m2_threshold == whole.m2_threshold
        assert got[0].normalizer == pytest.approx(whole.normalizer, rel=1e-12)
        bound_somewhere += math.isfinite(whole.m2_threshold or 0.0)
    assert bound_somewhere >= 5


def test_the_kept_tokens_of_a_minibatch_have_mean_weight_one() -> None:
    rules = Rules(weight="truncated", weight_high=1.5, weight_normalize=True, band=3.0, m2=0.5)
    for seed in range(100):
        got = corrected(draw(seed, rows=8), rules)
        kept = got.weight > 0
        if kept.any():
            assert float(got.weight[kept].mean()) == pytest.approx(1.0)


def test_sequence_weights_count_a_trajectory_once() -> None:
    """Weight 1 on four tokens and 2 on one token: divide by (1 + 2) / 2, not by (4 + 2) / 5."""
    ratios = torch.tensor([[1.0, 1.0, 1.0, 1.0], [2.0, 1.0, 1.0, 1.0]], dtype=torch.float64)
    mask = torch.tensor([[True] * 4, [True, False, False, False]])
    part = (ratios.log(), torch.zeros_like(ratios), mask, torch.zeros_like(mask))
    rules = Rules(weight="ratio", weight_level="sequence", weight_normalize=True)
    fixed = limits([part], rules, gather=alone_on_its_machine)
    assert fixed.normalizer == pytest.approx(1.5)
    got = correct(*part[:3], missing=part[3], rules=rules, limits=fixed)
    assert got.weight[:, 0].tolist() == pytest.approx([1 / 1.5, 2 / 1.5])


def test_the_product_is_clamped_after_the_sum() -> None:
    """Log-ratios -40, 12.5 and 12.5: their sum is -15; clamped one by one, it would be +5."""
    got = row([-40.0, 12.5, 12.5], weight="ratio", weight_level="sequence")
    assert got.weight[0].tolist() == pytest.approx([math.exp(-15.0)] * 3)
    assert row([-40.0, 12.5, 12.5], sequence=(1.0, 1e9)).causes["sequence"].all()
    assert row([-40.0, 12.5, 12.5], geometric=(1.0, 1e9)).causes["geometric"].all()
    assert row([-60.0, 12.5], weight="ratio", weight_level="sequence").weight[0, 0] == pytest.approx(math.exp(-20.0))


def test_the_normalizer_is_the_mean_truncated_weight_of_the_kept_tokens() -> None:
    """Ratios 0.5, 1, 4, 100: the band removes the last, the cap makes the third 2: (0.5 + 1 + 2) / 3."""
    ratios = torch.tensor([[0.5, 1.0, 4.0, 100.0]], dtype=torch.float64)
    mask = torch.ones(1, 4, dtype=torch.bool)
    part = (ratios.log(), torch.zeros_like(ratios), mask, ~mask)
    rules = Rules(weight="truncated", weight_high=2.0, weight_normalize=True, band=5.0)
    fixed = limits([part], rules, gather=alone_on_its_machine)
    assert fixed.normalizer == pytest.approx(3.5 / 3)
    assert fixed.m2_threshold is None
    got = correct(*part[:3], missing=part[3], rules=rules, limits=fixed)
    assert got.weight[0].tolist() == pytest.approx([0.5 * 3 / 3.5, 3 / 3.5, 6 / 3.5, 0.0])


def test_limits_of_an_empty_minibatch_do_not_change_weights() -> None:
    rules = Rules(weight="ratio", weight_normalize=True, m2=0.1)
    assert limits([], rules, gather=alone_on_its_machine) == Limits(1.0, math.inf)


def test_limits_are_computed_and_gathered_only_if_a_rule_needs_them() -> None:
    def never(value: Any) -> list[Any]:
        raise AssertionError("gather must not be called")

    assert limits([tensors(draw(0))], Rules(weight="ratio", band=2.0), gather=never) == Limits()
