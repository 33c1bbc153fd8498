"""Discrepancy rules for tokens, and all rules together, compared with the oracle (algorithms.md 6, 9, 16)."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from palimpsest.services.learner.corrections import Limits, Rules, correct
from palimpsest.services.learner.corrections.token_rules import divergence_estimate
from tests.learner_parts.corrections import corrected, row
from tests.oracles.corrections import draw, removed_tokens, token_weight
from tests.oracles.sequence_rules import sequence_weight

DRAWS = 200


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize(
    ("rules", "names", "bound"),
    [
        ({"band": 1.5}, ["band_high", "band_low"], 1.5),
        ({"tokens": (0.5, 5.0)}, ["tokens_high", "tokens_low"], (0.5, 5.0)),
        ({"tokens": (0.0, 1.3)}, ["tokens_high", "tokens_low"], (0.0, 1.3)),
        ({"difference": 0.1}, ["difference"], 0.1),
        ({"estimates": {"k1_token": 0.4}}, ["k1_token"], 0.4),
        ({"estimates": {"k2_token": 0.1}}, ["k2_token"], 0.1),
        ({"estimates": {"k3_token": 0.1}}, ["k3_token"], 0.1),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_a_rule_for_tokens_removes_what_the_oracle_removes(
    rules: dict[str, Any], names: list[str], bound: Any, dtype: torch.dtype
) -> None:
    found = dict.fromkeys(names, 0)
    for seed in range(DRAWS):
        data = draw(seed)
        causes = corrected(data, Rules(**rules), dtype).causes
        assert set(causes) == {"nonfinite", "missing", *names}
        for name in names:
            expected = removed_tokens(data, name, bound)
            np.testing.assert_array_equal(causes[name].numpy(), expected, err_msg=f"{name}, seed {seed}")
            found[name] += int(expected.sum())
    assert all(count or bound == (0.0, 1.3) for count in found.values()), found


@pytest.mark.parametrize("normalized", [False, True], ids=["not normalized", "normalized"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("kind", ["off", "ratio", "truncated", "clipped"])
def test_weights_equal_the_oracle(kind: str, level: str, normalized: bool) -> None:
    rules = Rules(
        weight=kind, weight_level=level, weight_low=0.6, weight_high=1.3, weight_normalize=normalized, band=3.0
    )  # type: ignore[arg-type]
    for seed in range(DRAWS):
        data = draw(seed)
        kept = data.usable & ~removed_tokens(data, "band_high", 3.0) & ~removed_tokens(data, "band_low", 3.0)
        expected = np.zeros(kept.shape)
        for i, t in zip(*np.nonzero(kept), strict=True):
            discrepancy = math.exp(np.clip(data.proximal[i, t] - data.behavior[i, t], -20, 20))
            expected[i, t] = (
                token_weight(discrepancy, kind, 0.6, 1.3)
                if level == "token"
                else sequence_weight(data, i, kind, 0.6, 1.3)
            )
        if normalized and kept.any():
            of_rows = [expected[i][kept[i]][0] for i in range(len(kept)) if kept[i].any()]
            expected /= expected[kept].mean() if level == "token" else np.mean(of_rows)
        got = corrected(data, rules)
        np.testing.assert_allclose(got.weight.numpy(), expected, rtol=1e-6, atol=0, err_msg=f"seed {seed}")
        np.testing.assert_array_equal(got.masked.numpy(), data.mask & ~kept)


@pytest.mark.parametrize(
    ("log_discrepancy", "ratio", "truncated", "clipped"),
    [(math.log(4), 4.0, 2.0, 2.0), (math.log(0.1), 0.1, 0.1, 0.5), (0.0, 1.0, 1.0, 1.0)],
)
def test_truncation_bounds_weights_above_and_clipping_also_below(
    log_discrepancy: float, ratio: float, truncated: float, clipped: float
) -> None:
    """algorithms.md 6: TIS with C = 2, CIS in [0.5, 2]."""
    for kind, expected in (("off", 1.0), ("ratio", ratio), ("truncated", truncated), ("clipped", clipped)):
        assert float(row([log_discrepancy], weight=kind).weight) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("x", "k1", "k2", "k3", "inverted"),
    [(0.1, -0.1, 0.005, 0.00517, 0.00484), (-0.5, 0.5, 0.125, 0.10653, 0.14872), (2.0, -2.0, 2.0, 4.38906, 1.13534)],
)
def test_estimates_equal_the_table_and_use_the_ratio_not_its_inverse(
    x: float, k1: float, k2: float, k3: float, inverted: float
) -> None:
    """algorithms.md 9."""
    got = {
        name: float(divergence_estimate(name, torch.tensor([[x]], dtype=torch.float64))) for name in ("k1", "k2", "k3")
    }
    assert got == {"k1": pytest.approx(k1), "k2": pytest.approx(k2), "k3": pytest.approx(k3, abs=5e-6)}
    assert float(divergence_estimate("k3", torch.tensor([[-x]], dtype=torch.float64))) == pytest.approx(
        inverted, abs=5e-6
    )


def test_k3_of_a_tiny_discrepancy_is_accurate_in_float32() -> None:
    x = torch.tensor([[1e-5]], dtype=torch.float32)
    assert float(divergence_estimate("k3", x)) == pytest.approx(0.5e-10, rel=1e-4)


def test_an_unknown_estimate_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown divergence estimate 'k4'"):
        divergence_estimate("k4", torch.zeros(1, 1))


def test_low_causes_are_tokens_less_likely_under_the_proximal_than_under_the_behavior() -> None:
    causes = row([math.log(3), -math.log(3)], band=2.0, tokens=(0.5, 2.0)).causes
    assert causes["band_high"].tolist() == causes["tokens_high"].tolist() == [[True, False]]
    assert causes["band_low"].tolist() == causes["tokens_low"].tolist() == [[False, True]]


def test_k1_removes_tokens_less_likely_under_the_proximal_only() -> None:
    """The bounds are on k1 = -log r, not on r (16.3a): 1 nat less is removed, 1 nat more is kept."""
    assert row([-1.0, 1.0], estimates={"k1_token": 0.5}).masked.tolist() == [[True, False]]


def test_a_token_exactly_on_a_bound_is_kept() -> None:
    behavior = torch.zeros(1, 3)
    proximal = torch.log(torch.tensor([[2.0, 0.5, 1.0]]))
    mask = torch.ones(1, 3, dtype=torch.bool)
    rules = Rules(band=2.0, tokens=(0.5, 2.0), veto=0.5)
    got = correct(proximal, behavior, mask, missing=~mask, rules=rules, limits=Limits())
    assert not got.masked.any()


@pytest.mark.parametrize("log_probability", [0.0, 1e-7])
def test_the_difference_rule_compares_probabilities_in_both_directions(log_probability: float) -> None:
    """Bound 0.2: 0.75 -> 1.0 and 1.0 -> 0.75 are removed; 0.001 -> 0.1 is kept, although its ratio is 100."""
    proximal = torch.tensor([[log_probability, math.log(0.75), math.log(0.1)]])
    behavior = torch.tensor([[math.log(0.75), log_probability, math.log(0.001)]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    got = correct(proximal, behavior, mask, missing=~mask, rules=Rules(difference=0.2), limits=Limits())
    assert got.causes["difference"].tolist() == [[True, True, False]]


def test_without_rules_every_finite_token_has_weight_one() -> None:
    got = row([5.0, -5.0, 0.0])
    assert got.weight.tolist() == [[1.0, 1.0, 1.0]]
    assert not got.masked.any()
    assert set(got.causes) == {"nonfinite", "missing"}
