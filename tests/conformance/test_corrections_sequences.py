"""Discrepancy rules for trajectories and for runs of tokens, compared with the oracle (algorithms.md 6, 9, 16.1)."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from palimpsest.services.learner.corrections import Limits, Rules, correct
from palimpsest.services.learner.corrections.ratios import log_mean, log_product
from palimpsest.services.learner.corrections.sequence_rules import estimate_rule, runs
from tests.learner_parts.corrections import corrected, row, tensors
from tests.oracles.corrections import draw
from tests.oracles.sequence_rules import geometric_mean, product, ratios_of, removed_rows

DRAWS = 200
ESTIMATES = {
    f"{k}_sequence_{level}": bound
    for k, bounds in (("k1", (1.0, 0.15, 0.7)), ("k2", (1.0, 0.12, 0.4)), ("k3", (1.0, 0.12, 0.4)))
    for level, bound in zip(("sum", "mean", "max"), bounds, strict=True)
}


def settings() -> list[Any]:
    rules: dict[str, Any] = {"veto": 0.3, "sequence": (0.3, 4.0), "geometric": (0.8, 1.2), "segment": (0.7, 1.3)}
    found = [pytest.param({name: bound}, name, bound, id=name) for name, bound in rules.items()]
    found += [
        pytest.param({name: (0.0, 1.05)}, name, (0.0, 1.05), id=f"{name}, above only")
        for name in ("sequence", "geometric", "segment")
    ]
    return found + [pytest.param({"estimates": {n: b}}, n, b, id=n) for n, b in ESTIMATES.items()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize(("rules", "name", "bound"), settings())
def test_a_rule_for_rows_removes_what_the_oracle_removes(
    rules: dict[str, Any], name: str, bound: Any, dtype: torch.dtype
) -> None:
    removed = kept = 0
    for seed in range(DRAWS):
        data = draw(seed)
        causes = corrected(data, Rules(**rules), dtype).causes
        expected = removed_rows(data, name, bound)
        assert list(causes) == ["nonfinite", "missing", name]
        np.testing.assert_array_equal(causes[name].numpy(), expected, err_msg=f"seed {seed}")
        removed, kept = removed + int(expected.sum()), kept + int((data.mask & ~expected).sum())
    assert min(removed, kept) > 100


def test_products_and_means_equal_the_oracle() -> None:
    for seed in range(DRAWS):
        data = draw(seed)
        proximal, behavior, _, _ = tensors(data)
        usable = torch.tensor(data.usable)
        log_discrepancy = torch.where(usable, (proximal - behavior).clamp(-20, 20), 0.0)
        ratios = [ratios_of(data, i) for i in range(len(data.mask))]
        for got, expected in (
            (log_product(log_discrepancy, usable), [product(r) for r in ratios]),
            (log_mean(log_discrepancy, usable), [geometric_mean(r) for r in ratios]),
        ):
            np.testing.assert_allclose(got.exp().squeeze(1).numpy(), expected, rtol=1e-9, err_msg=f"seed {seed}")


def test_a_product_stays_within_e_to_the_20() -> None:
    weight = row([15.0, 15.0, 15.0], weight="ratio", weight_level="sequence").weight
    assert weight[0].tolist() == pytest.approx([math.exp(20)] * 3)
    weight = row([-15.0, -15.0, -15.0], weight="ratio", weight_level="sequence").weight
    assert weight[0].tolist() == pytest.approx([math.exp(-20)] * 3)


def test_the_mean_of_a_long_trajectory_is_accurate_enough_for_a_narrow_band() -> None:
    """Bands may be as narrow as 1e-4 on the mean of 32768 float32 terms."""
    generator = np.random.default_rng(0)
    values = torch.from_numpy(generator.normal(1e-4, 0.3, (1, 32768)).astype(np.float32))
    mean = float(log_mean(values, torch.ones_like(values, dtype=torch.bool)))
    assert mean == pytest.approx(float(values.double().mean()), abs=1e-9)


def test_a_probability_that_vanishes_gives_a_number_not_nan() -> None:
    """16.1b: exp(-200) is 0 in float32, and its log times a mask of 0 is NaN; the code never takes log(exp(x))."""
    proximal = torch.tensor([[-200.0, -1.0, -200.0], [-1.0, -1.0, -1.0]])
    behavior = torch.tensor([[-0.0, -1.0, -0.0], [-1.0, -1.0, -1.0]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    rules = Rules(
        weight="ratio", weight_level="sequence", geometric=(0.9, 1.1), sequence=(0.5, 2.0), segment=(0.9, 1.1),
        veto=1e-4, estimates={"k3_sequence_mean": 1e-2},
    )  # fmt: skip
    got = correct(proximal, behavior, mask, missing=~mask, rules=rules, limits=Limits())
    assert got.masked.tolist() == [[True, True, False], [False, False, False]]
    assert got.weight.tolist() == [[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]


def test_one_token_with_a_tiny_ratio_vetoes_its_trajectory() -> None:
    """algorithms.md 6: 1e-4."""
    assert row([0.0, math.log(0.9e-4), 0.0], veto=1e-4).masked.tolist() == [[True, True, True]]
    assert row([0.0, math.log(1.1e-4), 9.0], veto=1e-4).masked.tolist() == [[False, False, False]]


def test_the_geometric_band_does_not_depend_on_length_and_the_product_does() -> None:
    for length, removed in ((10, False), (1000, True)):
        causes = row([0.005] * length, geometric=(0.99, 1.01), sequence=(0.5, 2.0)).causes
        assert not causes["geometric"].any()
        assert bool(causes["sequence"].all()) is removed


def test_unusable_tokens_do_not_count_in_a_mean() -> None:
    """Two usable tokens of log 0.3 each: mean 0.3, not 0.15."""
    proximal = torch.tensor([[-0.7, math.nan, -0.7, 0.0]], dtype=torch.float64)
    behavior = torch.tensor([[-1.0, -1.0, -1.0, -1.0]], dtype=torch.float64)
    mask, missing = torch.ones(1, 4, dtype=torch.bool), torch.tensor([[False, False, False, True]])
    for name in ("geometric", "segment"):
        for high, removed in ((math.exp(0.29), True), (math.exp(0.31), False)):
            rules = Rules(**{name: (0.5, high)})
            got = correct(proximal, behavior, mask, missing=missing, rules=rules, limits=Limits())
            assert bool(got.causes[name].all()) is removed
    rules = Rules(estimates={"k2_sequence_mean": 0.04})
    got = correct(proximal, behavior, mask, missing=missing, rules=rules, limits=Limits())
    assert got.causes["k2_sequence_mean"].all()  # 0.045; with all four tokens counted it would be 0.0225


def test_a_trajectory_without_finite_tokens_fails_no_rule() -> None:
    """Its tokens are masked as nonfinite, and k1 of no tokens is not above a negative bound."""
    nothing = torch.full((1, 2), math.nan)
    mask = torch.ones(1, 2, dtype=torch.bool)
    rules = Rules(
        geometric=(2.0, 3.0), sequence=(2.0, 3.0), veto=2.0,
        estimates={f"k1_sequence_{level}": -1.0 for level in ("sum", "mean", "max")},
    )  # fmt: skip
    got = correct(nothing, nothing, mask, missing=~mask, rules=rules, limits=Limits())
    assert not any(
        got.causes[name].any() for name in ("veto", "k1_sequence_sum", "k1_sequence_mean", "k1_sequence_max")
    )


def test_runs_are_numbered_in_each_row_and_end_at_untrainable_tokens() -> None:
    mask = torch.tensor([[1, 1, 0, 1, 0, 0, 1], [0, 0, 1, 1, 1, 1, 1], [0] * 7], dtype=torch.bool)
    assert runs(mask).tolist() == [[0, 0, -1, 1, -1, -1, 2], [-1, -1, 0, 0, 0, 0, 0], [-1] * 7]
    assert runs(torch.zeros(1, 0, dtype=torch.bool)).shape == (1, 0)


def test_the_segment_rule_removes_one_turn_only() -> None:
    proximal = torch.tensor([[-1.0, -1.0, 0.0, -2.0, -2.0]])
    behavior = torch.tensor([[-1.0, -1.0, 0.0, -1.0, -1.0]])
    mask = torch.tensor([[True, True, False, True, True]])
    got = correct(proximal, behavior, mask, missing=~mask & mask, rules=Rules(segment=(0.5, 2.0)), limits=Limits())
    assert got.causes["segment"].tolist() == [[False, False, False, True, True]]
    whole = correct(proximal, behavior, mask, missing=~mask & mask, rules=Rules(geometric=(0.5, 2.0)), limits=Limits())
    assert not whole.causes["geometric"].any()


def test_a_trajectory_on_the_bound_is_kept() -> None:
    log_2 = math.log(2.0)
    got = row([log_2, -log_2, log_2], sequence=(0.5, 2.0), geometric=(0.5, 2.0 ** (1 / 3)), veto=0.5)
    assert not got.masked.any()


def test_an_unknown_level_is_refused() -> None:
    yes = torch.ones(1, 1, dtype=torch.bool)
    with pytest.raises(ValueError, match="unknown level 'median'"):
        estimate_rule("k1", "median", torch.zeros(1, 1), yes, yes, 1.0)
