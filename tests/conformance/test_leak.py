"""Errors of a surrogate, compared with a token-by-token count (algorithms.md 2.1, 2.2, 4.4 to 4.9)."""

import dataclasses
import math

import numpy as np
import pytest

from palimpsest.services.learner.observability.surrogate_error import (
    AuditedTokens,
    Thresholds,
    clipped,
    leak_by_staleness,
    masked,
    surrogate_error,
)
from tests.oracles import surrogates as oracle

DRAWS = 200
THRESHOLDS = Thresholds(band=1.2, clip_low=0.2, clip_high=0.28)
WRONGS = (
    "masked_wrongly", "kept_wrongly", "clipped_wrongly", "unclipped_wrongly", "removed_wrongly", "trained_wrongly",
)  # fmt: skip


def tokens(**values: object) -> AuditedTokens:
    """Tokens with these values, as float32 like those of a batch; staleness as int32."""
    arrays = {name: np.atleast_1d(np.asarray(value, dtype=np.float32)) for name, value in values.items()}
    return AuditedTokens(**arrays | {"staleness": arrays["staleness"].astype(np.int32)})


def drawn(seed: int) -> AuditedTokens:
    generator = np.random.default_rng(seed)
    count = int(generator.integers(1, 80))
    behavior = -generator.exponential(1.0, count)
    old = behavior + generator.normal(0, 0.15, count)
    return tokens(
        staleness=generator.integers(0, 5, count),
        behavior=behavior,
        surrogate=old + generator.normal(0.05, 0.2, count),
        old=old,
        current=old + generator.normal(0, 0.3, count),
        advantages=generator.choice([-1.0, 0.0, 2.0], count),
    )


def test_all_statistics_equal_the_token_by_token_oracle() -> None:
    seen = dict.fromkeys(WRONGS, 0.0)
    for seed in range(DRAWS):
        data = drawn(seed)
        arrays = {f.name: getattr(data, f.name).astype(np.float64) for f in dataclasses.fields(data)}
        arrays["staleness"] = data.staleness
        expected = oracle.leak(**arrays, band=1.2, low=0.2, high=0.28)
        got = leak_by_staleness(data, THRESHOLDS)
        assert got.keys() == expected.keys(), f"seed {seed}"
        for staleness, values in expected.items():
            assert {name: got[staleness][name] for name in values} == pytest.approx(values, rel=1e-9, abs=1e-12)
            for name in WRONGS:
                seen[name] += values[name]
    assert min(seen.values()) > 1  # every kind of error occurred


def test_the_correlation_is_pearsons() -> None:
    for seed in range(DRAWS):
        data = drawn(seed + DRAWS)
        if len(data.staleness) < 3:
            continue
        seen = data.surrogate.astype(np.float64) - data.behavior
        true = data.old.astype(np.float64) - data.behavior
        assert surrogate_error(data, THRESHOLDS)["correlation"] == pytest.approx(
            np.corrcoef(seen, true)[0, 1], abs=1e-9
        )


A = {"staleness": 4, "behavior": -1.20, "old": -1.10, "current": -0.90, "advantages": 1.0}


@pytest.mark.parametrize(
    ("surrogate", "leaked", "wrong"),
    [
        (-1.10, 0.0, set()),
        (-0.95, 0.15, {"masked_wrongly", "unclipped_wrongly"}),
        (-1.20, -0.10, set()),
        (-0.975, 0.125, {"masked_wrongly", "unclipped_wrongly"}),
        (-0.96699, 0.13301, {"masked_wrongly", "unclipped_wrongly"}),
    ],
    ids=["exact", "current_recompute", "bypass", "loglinear d=4", "arithmetic, same weights"],
)
def test_18_2_surrogates_diagnose_the_token_of_example_a_differently(
    surrogate: float, leaked: float, wrong: set[str]
) -> None:
    """c = 1.2, epsilon = 0.2, A > 0. No case trains on the token: the errors of the two constraints cancel."""
    found = surrogate_error(tokens(**A, surrogate=surrogate), Thresholds(band=1.2, clip_low=0.2, clip_high=0.2))
    assert found["leak_mean"] == pytest.approx(leaked, abs=2e-6)
    assert found["leak_rms"] == pytest.approx(abs(leaked), abs=2e-6)
    assert {name for name in WRONGS if found[name] == 1.0} == wrong
    assert {name for name in WRONGS if found[name] == 0.0} == set(WRONGS) - wrong


def test_18_2_the_leak_moves_from_one_factor_to_the_other() -> None:
    data = drawn(3)
    seen, true = data.surrogate - data.behavior, data.old - data.behavior
    e = data.surrogate - data.old
    np.testing.assert_allclose(seen, true + e, atol=1e-6)
    np.testing.assert_allclose(data.current - data.surrogate, data.current - data.old - e, atol=1e-6)
    assert surrogate_error(data, THRESHOLDS)["leak_mean"] == pytest.approx(float(e.mean()), abs=1e-6)


def test_an_exact_proximal_has_no_errors() -> None:
    data = drawn(4)
    exact = surrogate_error(dataclasses.replace(data, surrogate=data.old), THRESHOLDS)
    assert exact["correlation"] == pytest.approx(1.0)
    assert {name: exact[name] for name in (*WRONGS, "leak_mean", "leak_rms")} == dict.fromkeys(
        (*WRONGS, "leak_mean", "leak_rms"), 0.0
    )


def test_a_surrogate_without_any_discrepancy_has_no_correlation() -> None:
    data = drawn(5)
    assert math.isnan(surrogate_error(dataclasses.replace(data, surrogate=data.behavior), THRESHOLDS)["correlation"])


def test_constraints_that_are_off_make_no_errors() -> None:
    data = drawn(6)
    everything = surrogate_error(data, Thresholds(band=None, clip_low=None, clip_high=None))
    assert [everything[name] for name in WRONGS] == [0.0] * len(WRONGS)
    assert everything["leak_rms"] > 0.1
    clip = surrogate_error(data, Thresholds(band=None, clip_low=0.2, clip_high=0.2))
    assert clip["masked_wrongly"] == 0.0
    assert clip["clipped_wrongly"] + clip["unclipped_wrongly"] > 0
    band = surrogate_error(data, Thresholds(band=1.2, clip_low=None, clip_high=None))
    assert band["clipped_wrongly"] + band["unclipped_wrongly"] == 0.0
    assert band["masked_wrongly"] > 0


@pytest.mark.parametrize("where", ["behavior", "surrogate", "old", "current"])
@pytest.mark.parametrize("what", [float("nan"), float("-inf")])
def test_18_8_a_nonfinite_token_is_counted_and_excluded(where: str, what: float) -> None:
    data = drawn(7)
    values = getattr(data, where).copy()
    values[2] = what
    found = surrogate_error(dataclasses.replace(data, **{where: values}), THRESHOLDS)
    without = surrogate_error(data.where(np.arange(len(values)) != 2), THRESHOLDS)
    assert found["nonfinite"] == 1.0
    assert found["tokens"] == len(values)
    assert {name: found[name] for name in found if name not in ("tokens", "nonfinite")} == {
        name: without[name] for name in without if name not in ("tokens", "nonfinite")
    }


def test_statistics_of_no_tokens_are_nan() -> None:
    nothing = drawn(8).where(np.zeros(len(drawn(8).staleness), dtype=bool))
    found = surrogate_error(nothing, THRESHOLDS)
    assert (found["tokens"], found["nonfinite"]) == (0.0, 0.0)
    assert all(math.isnan(value) for name, value in found.items() if name not in ("tokens", "nonfinite"))
    assert leak_by_staleness(nothing, THRESHOLDS) == {}


def test_joined_tokens_have_the_weighted_mean_of_the_parts() -> None:
    a, b = drawn(9), drawn(10)
    both = AuditedTokens.joined([a, b])
    assert len(both.old) == len(a.old) + len(b.old)
    sums = [surrogate_error(part, THRESHOLDS) for part in (a, b)]
    mean = sum(part["leak_mean"] * part["tokens"] for part in sums) / sum(part["tokens"] for part in sums)
    assert surrogate_error(both, THRESHOLDS)["leak_mean"] == pytest.approx(mean)


def test_the_constraints_at_their_bounds() -> None:
    """A ratio slightly beyond a bound is out; for the clip, the sign of the advantage selects the bound."""
    for factor, out in ((0.999, False), (1.001, True)):
        for sign in (1.0, -1.0):
            proximal = np.array([-1.0 + sign * factor * np.log(1.2)])
            assert bool(masked(proximal, np.array([-1.0]), THRESHOLDS)[0]) is out
        above = np.array([np.log(1 + 0.28) * factor])
        below = np.array([np.log(1 - 0.2) * factor])
        zero = np.zeros(1)
        assert bool(clipped(above, zero, np.ones(1), THRESHOLDS)[0]) is out
        assert bool(clipped(below, zero, -np.ones(1), THRESHOLDS)[0]) is out
        assert not clipped(above, zero, -np.ones(1), THRESHOLDS)[0]
        assert not clipped(below, zero, np.ones(1), THRESHOLDS)[0]
        assert not clipped(above, zero, zero, THRESHOLDS)[0]


def test_a_lower_clip_bound_of_0_never_binds() -> None:
    whole = Thresholds(band=None, clip_low=1.0, clip_high=None)
    assert not clipped(np.array([-30.0]), np.zeros(1), -np.ones(1), whole).any()


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({"band": 1.0}, r"band is 1\.0; it must be above 1"),
        ({"clip_low": -0.1}, r"clip_low is -0\.1"),
        ({"clip_low": 1.1}, r"clip_low is 1\.1"),
        ({"clip_high": 0.0}, r"clip_high is 0\.0"),
    ],
)
def test_invalid_thresholds_are_refused(bounds: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Thresholds(**{"band": None, "clip_low": None, "clip_high": None} | bounds)
