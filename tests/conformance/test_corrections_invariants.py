"""Properties of every discrepancy rule (algorithms.md 6.1, 16.1, 18.7, 18.8, 18.11)."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from palimpsest.services.learner.corrections import Limits, Rules, alone, correct, overlap
from palimpsest.services.learner.corrections.rules import ESTIMATES
from tests.learner_parts.corrections import ALL, corrected, row
from tests.oracles.corrections import Draw, draw, removed_tokens
from tests.oracles.sequence_rules import removed_rows

DRAWS = 200


@pytest.mark.parametrize("spoil", [math.nan, math.inf, -math.inf, 1e30, 7.0])
def test_18_7_values_at_untrainable_tokens_change_no_bit(spoil: float) -> None:
    rules = Rules(weight="truncated", weight_level="sequence", weight_normalize=True, **ALL)
    for seed in range(40):
        data = draw(seed)
        spoiled = Draw(
            np.where(data.mask, data.proximal, spoil),
            np.where(data.mask, data.behavior, -spoil),
            data.mask,
            np.where(data.mask, data.missing, ~data.missing),
        )
        plain = Draw(
            np.where(data.mask, data.proximal, 0.0), np.where(data.mask, data.behavior, 0.0), data.mask, data.missing
        )
        for dtype in (torch.float32, torch.float64):
            got, expected = corrected(spoiled, rules, dtype), corrected(plain, rules, dtype)
            assert torch.equal(got.weight, expected.weight)
            assert torch.equal(got.masked, expected.masked)
            assert got.causes.keys() == expected.causes.keys()
            assert all(torch.equal(got.causes[name], expected.causes[name]) for name in got.causes)
        assert not got.masked[~torch.tensor(data.mask)].any()
        assert not got.weight[~torch.tensor(data.mask)].any()


def test_18_7_padding_changes_no_decision() -> None:
    rules = Rules(weight="ratio", weight_normalize=True, **ALL)
    for seed in range(40):
        data = draw(seed)
        wide = ((0, 0), (0, 5))
        padded = Draw(
            np.pad(data.proximal, wide),
            np.pad(data.behavior, wide),
            np.pad(data.mask, wide),
            np.pad(data.missing, wide),
        )
        got, expected = corrected(padded, rules), corrected(data, rules)
        assert torch.equal(got.masked[:, :-5], expected.masked)
        torch.testing.assert_close(got.weight[:, :-5], expected.weight)


@pytest.mark.parametrize("where", ["proximal", "behavior"])
@pytest.mark.parametrize("what", [math.nan, math.inf, -math.inf])
def test_18_8_a_nonfinite_token_is_masked_and_counted_and_does_not_affect_the_others(where: str, what: float) -> None:
    for seed in range(DRAWS // 5):
        data = draw(seed, broken=0.0)
        data.mask[0, 0] = True
        getattr(data, where)[0, 0] = what
        got = corrected(data, Rules(weight="ratio", weight_level="sequence", weight_normalize=True, **ALL))
        assert got.causes["nonfinite"].sum() == 1
        assert got.causes["nonfinite"][0, 0]
        assert got.masked[0, 0]
        assert got.weight[0, 0] == 0
        assert torch.isfinite(got.weight).all()
        # the others get the weights they have without the token; the segment rule is off, since the token splits a run
        left_out = Draw(data.proximal, data.behavior, data.mask.copy(), data.missing)
        left_out.mask[0, 0] = False
        without = corrected(left_out, Rules(weight="ratio", weight_level="sequence", **{**ALL, "segment": None}))
        same = corrected(data, Rules(weight="ratio", weight_level="sequence", **{**ALL, "segment": None}))
        assert torch.equal(same.weight, without.weight)


def test_18_8_a_batch_without_finite_tokens_has_zero_weights_and_no_nan() -> None:
    nothing = np.full((2, 3), np.nan)
    data = Draw(nothing, nothing, np.ones((2, 3), dtype=bool), np.zeros((2, 3), dtype=bool))
    got = corrected(data, Rules(weight="ratio", weight_level="sequence", weight_normalize=True, **ALL))
    assert got.masked.all()
    assert got.weight.tolist() == [[0.0] * 3] * 2
    assert got.causes["nonfinite"].all()


def test_a_missing_proximal_is_masked_and_never_a_discrepancy_of_one() -> None:
    """16.1c: no other number replaces it, even if the array holds one."""
    proximal, behavior = torch.tensor([[-1.0, 0.0, math.nan]]), torch.full((1, 3), -1.0)
    mask, missing = torch.ones(1, 3, dtype=torch.bool), torch.tensor([[False, True, True]])
    got = correct(proximal, behavior, mask, missing=missing, rules=Rules(weight="ratio"), limits=Limits())
    assert got.weight.tolist() == [[1.0, 0.0, 0.0]]
    assert {name: removed.tolist() for name, removed in got.causes.items()} == {
        "missing": [[False, True, True]],
        "nonfinite": [[False, False, False]],
    }


def test_18_11_removals_by_one_cause_and_by_several_sum_to_the_masked_tokens() -> None:
    for seed in range(DRAWS):
        data = draw(seed)
        got = corrected(data, Rules(**ALL))
        single = alone(got.causes)
        assert sum(int(removed.sum()) for removed in single.values()) + int(overlap(got.causes).sum()) == int(
            got.masked.sum()
        )
        assert torch.equal(torch.stack([*single.values(), overlap(got.causes)]).any(dim=0), got.masked)
        assert torch.equal((got.weight > 0), torch.tensor(data.mask) & ~got.masked)
        assert {t.dtype for t in (got.masked, *got.causes.values(), *single.values())} == {torch.bool}


@pytest.mark.thorough
def test_18_11_a_rule_removes_the_same_tokens_with_and_without_the_others() -> None:
    for seed in range(DRAWS):
        data = draw(seed)
        together = corrected(data, Rules(**ALL)).causes
        settings = [{name: bound} for name, bound in ALL.items() if name != "estimates"]
        settings += [{"estimates": {name: bound}} for name, bound in ALL["estimates"].items()]
        by_itself = {}
        for setting in settings:
            by_itself |= corrected(data, Rules(**setting)).causes
        assert by_itself.keys() == together.keys()
        assert all(torch.equal(by_itself[name], together[name]) for name in together)


def test_causes_are_listed_in_the_order_of_evaluation() -> None:
    causes = list(row([0.1, 0.2], **ALL).causes)
    assert causes[:6] == ["nonfinite", "missing", "veto", "sequence", "geometric", "segment"]
    assert causes[6:15] == [name for name in ESTIMATES if not name.endswith("token")]
    assert causes[15:] == [
        "band_high", "band_low", "tokens_high", "tokens_low", "difference", "k1_token", "k2_token", "k3_token", "m2",
    ]  # fmt: skip


@pytest.mark.parametrize("which", ["mask", "missing"])
def test_18_11_an_integer_mask_is_refused(which: str) -> None:
    """16.1a: the complements of the integers 1 and 0 are -2 and -1, and both are true."""
    masks = {"mask": torch.ones(1, 2, dtype=torch.bool), "missing": torch.zeros(1, 2, dtype=torch.bool)}
    masks[which] = masks[which].int()
    with pytest.raises(ValueError, match=f"{which} is torch.int32"):
        correct(torch.zeros(1, 2), torch.zeros(1, 2), **masks, rules=Rules(), limits=Limits())


def test_arguments_of_different_shapes_are_refused() -> None:
    mask = torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"\[rows, tokens\]"):
        correct(torch.zeros(1, 3), torch.zeros(1, 2), mask, missing=~mask, rules=Rules(), limits=Limits())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Rules(weight="cut"), "weight"),  # type: ignore[arg-type]
        (lambda: Rules(weight_level="batch"), "weight_level"),  # type: ignore[arg-type]
        (lambda: Rules(weight="clipped", weight_low=3.0), "weight_low"),
        (lambda: Rules(weight="truncated", weight_high=0.0), "weight_high"),
        (lambda: Rules(band=1.0), "band = 1.0"),
        (lambda: Rules(tokens=(2.0, 0.5)), "tokens"),
        (lambda: Rules(sequence=(-1.0, 0.5)), "sequence"),
        (lambda: Rules(veto=0.0), "veto"),
        (lambda: Rules(m2=math.nan), "m2"),
        (lambda: Rules(estimates={"k3": 0.1}), "no estimate k3"),
        (lambda: Rules(estimates={"k3_token": math.nan}), "k3_token"),
    ],
)
def test_invalid_bounds_are_refused(build: Callable[[], Rules], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_weights_have_no_gradient() -> None:
    proximal = torch.full((1, 2), -1.0, requires_grad=True)
    behavior = torch.full((1, 2), -1.1, requires_grad=True)
    mask = torch.ones(1, 2, dtype=torch.bool)
    got = correct(proximal, behavior, mask, missing=~mask, rules=Rules(weight="ratio"), limits=Limits())
    assert not got.weight.requires_grad
    assert got.weight.dtype == torch.float32


@pytest.mark.thorough
def test_all_rules_together_remove_the_union_of_the_oracles_masks() -> None:
    rules = {name: bound for name, bound in ALL.items() if name != "m2"}
    for seed in range(DRAWS):
        data = draw(seed)
        expected = data.mask & ~data.usable
        for name in ("veto", "sequence", "geometric", "segment"):
            expected |= removed_rows(data, name, ALL[name])
        for name, bound in ALL["estimates"].items():
            expected |= (removed_tokens if name.endswith("token") else removed_rows)(data, name, bound)
        for name in ("band_high", "band_low", "tokens_high", "tokens_low", "difference"):
            expected |= removed_tokens(data, name, ALL[name.split("_")[0]])
        np.testing.assert_array_equal(corrected(data, Rules(**rules)).masked.numpy(), expected, err_msg=f"seed {seed}")
