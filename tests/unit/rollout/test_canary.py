"""What the canaries catch, and what they must let pass (docs/paper.md, "canary")."""

import math

import numpy as np
import pytest
from hypothesis import given, strategies as st
from numpy.typing import NDArray

from palimpsest.common.snapshots.manifest import Canary
from palimpsest.services.rollout.canary import (
    DEFAULT_TOLERANCE,
    LEANING,
    LEAST_TOLERANCE,
    OUTLYING,
    Verdict,
    judge,
    stale_share,
    tolerance_for,
)

TOKENS = 300
Values = NDArray[np.float64]


def heavy(rng: np.random.Generator, tokens: int) -> Values:
    """Rounding as bf16 shows it: mean |x| 1, few tokens far out (Student's t with 3 degrees of freedom)."""
    draws = rng.standard_t(3, tokens)
    return draws / 1.1026577908435842


def version(seed: int, *, noise: float, step: float, tokens: int = TOKENS) -> tuple[Values, Values, Values, Values]:
    """Log-probs of a correct engine, of the learner, in float32, and in float32 before the step.

    Engine and learner share a part of their rounding, since they compute the same products in another order. Rounding
    and step are larger where the token is unlikely. The engine is biased.
    """
    rng = np.random.default_rng(seed)
    float32 = -rng.exponential(1.5, tokens)
    scale = noise * (0.5 + 0.5 * np.abs(float32) / 1.5)
    shared = heavy(rng, tokens)
    learner = float32 + scale * (0.6 * shared + 0.8 * heavy(rng, tokens)) - 0.2 * scale
    engine = float32 + scale * (0.6 * shared + 0.8 * heavy(rng, tokens)) - 0.3 * scale
    previous = float32 + step * heavy(rng, tokens) * (0.5 + 0.5 * np.abs(float32) / 1.5)
    return engine, learner, float32, previous


def verdict(engine: Values, learner: Values, float32: Values, previous: Values) -> Verdict:
    count = len(engine)
    canary = Canary(
        tuple(range(count + 1)), tuple(range(1, count + 1)), tuple(learner), tuple(previous), tuple(float32)
    )
    return judge([list(engine)], [canary])


@given(
    seed=st.integers(0, 10**9),
    noise=st.floats(0.0005, 0.05),
    step=st.floats(0.0001, 0.1),
    tokens=st.sampled_from([24, 60, 300, 1000]),
)
def test_rounding_alone_is_accepted(seed: int, noise: float, step: float, tokens: int) -> None:
    assert verdict(*version(seed, noise=noise, step=step, tokens=tokens)).accepted


@pytest.mark.thorough
def test_fewer_than_1_in_10000_correct_engines_are_refused() -> None:
    """5,000 versions over the noise and the steps that occur; `test_fewer_still_in_100000_versions` has more."""
    assert refused_share(5_000) == 0


@pytest.mark.long
def test_fewer_still_in_100000_versions() -> None:
    assert refused_share(100_000) < 1e-4


def refused_share(versions: int) -> float:
    rng = np.random.default_rng(5)
    refused = 0
    for seed in range(versions):
        noise, step = 10 ** rng.uniform(-3.3, -1.3), 10 ** rng.uniform(-4, -1)
        tokens = int(rng.choice([24, 60, 150, 300, 600]))
        refused += not verdict(*version(seed, noise=noise, step=step, tokens=tokens)).accepted
    return refused / versions


def test_an_engine_that_lacks_half_of_the_step_is_refused() -> None:
    """Step and rounding of the same size, as for a real model: the mean alone would accept it."""
    refused = []
    for seed in range(40):
        engine, learner, float32, previous = version(seed, noise=0.013, step=0.013, tokens=600)
        found = verdict(engine + 0.5 * (previous - float32), learner, float32, previous)
        assert found.error < found.tolerance
        assert found.stale == pytest.approx(0.5, abs=0.25)
        refused.append(found.leans)
        assert not found.leans or "the engine lacks" in found.reason()
    assert sum(refused) >= 34


@pytest.mark.parametrize("seed", range(20))
def test_a_load_of_the_previous_version_is_refused(seed: int) -> None:
    engine, learner, float32, previous = version(seed, noise=0.002, step=0.003)
    found = verdict(engine + (previous - float32), learner, float32, previous)
    assert found.has_power
    assert not found.accepted
    assert found.stale == pytest.approx(1.0, abs=0.3)


def test_shared_rounding_would_look_like_previous_weights() -> None:
    """The reason for float32: with the learner's own log-probs in the change, every correct engine is refused."""
    engine, learner, float32, previous = version(3, noise=0.013, step=0.013, tokens=1000)
    share, deviation = stale_share(
        engine, learner, learner, learner + (previous - float32) + (float32 - learner), np.arange(1000)
    )
    assert share / deviation > LEANING
    share, deviation = stale_share(engine, learner, float32, previous, np.arange(1000))
    assert abs(share / deviation) < LEANING / 2


def test_a_step_below_the_rounding_has_no_power_and_says_so() -> None:
    found = verdict(*version(1, noise=0.04, step=0.001))
    assert found.detectable > 1.0
    assert not found.has_power
    assert found.accepted


def test_one_token_cannot_refuse_a_version() -> None:
    engine, learner, float32, previous = version(1, noise=0.001, step=0.0)
    previous[7] += 3.0
    engine[7] += 2.9
    found = verdict(engine, learner, float32, previous)
    assert found.leaning == 0.0
    assert math.isinf(found.detectable)


def test_repeated_contexts_do_not_count_as_independent_tokens() -> None:
    """40 different tokens, each 25 times with the same rounding and change, as in trajectories of one task."""
    refused_alone = 0
    for seed in range(200):
        values = [np.repeat(column, 25) for column in version(seed, noise=0.002, step=0.01, tokens=40)]
        groups = np.repeat(np.arange(40), 25)
        share, deviation = stale_share(*values, groups)
        assert not (share > 6 * deviation and share > 0.25)
        share, deviation = stale_share(*values, np.arange(1000))
        refused_alone += share > LEANING * deviation
    assert refused_alone > 0, "without groups, repeated rounding looks like previous weights"


def test_the_share_is_an_instrumental_regression_beside_constant_log_prob_and_rounding() -> None:
    """Against the textbook's formula (Z'X)^-1 Z'y with all columns at once."""
    engine, learner, float32, previous = version(11, noise=0.01, step=0.02)
    others = np.column_stack([np.ones(TOKENS), float32, learner - float32])
    change = previous - float32
    rest = change - others @ np.linalg.lstsq(others, change, rcond=None)[0]
    limit = OUTLYING * np.median(np.abs(rest))
    x, z = np.column_stack([change, others]), np.column_stack([np.clip(rest, -limit, limit), others])
    expected = np.linalg.solve(z.T @ x, z.T @ (engine - float32))[0]
    share, deviation = stale_share(engine, learner, float32, previous, np.arange(TOKENS))
    assert share == pytest.approx(expected, rel=1e-9)
    assert 0.0 < deviation < 1.0


def test_the_tolerance_is_a_multiple_of_the_noise() -> None:
    assert tolerance_for(0.013, 400) == pytest.approx(0.013 * (4 + 0.5))
    assert tolerance_for(0.0001, 400) == LEAST_TOLERANCE
    found = verdict(*version(2, noise=0.01, step=0.001))
    assert found.tolerance == pytest.approx(0.046, rel=0.3)


def test_a_gross_error_is_refused_under_the_noise_of_the_model_at_hand() -> None:
    """SmolLM2-135M rounds by 0.07 nats on its own samples without a prompt."""
    engine, learner, float32, previous = version(4, noise=0.07, step=0.01)
    assert verdict(engine, learner, float32, previous).accepted
    found = verdict(engine - 0.5, learner, float32, previous)
    assert not found.accepted
    assert "exceeds the tolerance" in found.reason()


def test_a_large_error_is_refused_even_without_a_previous_version() -> None:
    canary = Canary((1, 2, 3), (1, 2), (-1.0, -2.0), previous=())
    found = judge([[-1.1, -2.2]], [canary], tolerance=0.1)
    assert found.error == pytest.approx(0.15)
    assert found.leaning == 0.0
    assert not found.accepted
    assert "canary error 0.1500 nats exceeds the tolerance 0.1000 nats" in found.reason()


def test_a_manifest_of_an_earlier_release_is_judged_by_its_mean_alone() -> None:
    count = 50
    canary = Canary(tuple(range(count + 1)), tuple(range(1, count + 1)), (-1.0,) * count, (-0.9,) * count)
    found = judge([[-0.98] * count], [canary])
    assert (found.tolerance, found.leaning, found.accepted) == (DEFAULT_TOLERANCE, 0.0, True)
    assert not judge([[-0.96] * count], [canary]).accepted


@pytest.mark.parametrize("score", [[-1.0], [], [-1.0, math.nan], [-1.0, math.inf], [-1.0, -math.inf]])
def test_missing_or_meaningless_scores_are_refused(score: list[float]) -> None:
    canary = Canary((1, 2, 3), (1, 2), (-1.0, -2.0), previous=(-1.0, -2.0), float32=(-1.0, -2.0))
    found = judge([score], [canary], tolerance=10.0)
    assert found.error == math.inf
    assert not found.accepted


def test_a_version_without_anything_to_compare_is_refused() -> None:
    assert not judge([], [], tolerance=10.0).accepted
