"""What the canaries catch, and what they must let pass (docs/paper.md, "canary")."""

import math
import random

import pytest
from hypothesis import given, strategies as st

from palimpsest.common.snapshots.manifest import Canary
from palimpsest.services.rollout.canary import LEANING, judge

TOLERANCE = 0.03
ROUNDING = 0.002
"""Nats a token, measured on the CPU engine."""
TOKENS = 300


def a_canary(seed: int, *, move: float) -> Canary:
    """TOKENS compared tokens, each moved by the last step by a normal number of this deviation, nats."""
    rng = random.Random(seed)
    now = [-rng.expovariate(1.0) for _ in range(TOKENS)]
    before = [value + rng.gauss(0.0, move) for value in now]
    return Canary(tuple(range(TOKENS + 1)), tuple(range(1, TOKENS + 1)), tuple(now), tuple(before))


def scores(canary: Canary, seed: int, *, stale: float, bias: float = 0.0) -> list[list[float]]:
    """Scores of an engine that rounds and computes a share `stale` of each value with the previous weights."""
    rng = random.Random(seed + 1)
    return [
        [
            now + stale * (before - now) + rng.gauss(bias, ROUNDING)
            for now, before in zip(canary.logprobs, canary.previous, strict=True)
        ]
    ]


@given(seed=st.integers(0, 10_000), move=st.sampled_from([1e-4, 0.003, 0.05, 1.0]), bias=st.floats(-0.002, 0.002))
def test_rounding_alone_is_accepted(seed: int, move: float, bias: float) -> None:
    canary = a_canary(seed, move=move)
    assert judge(scores(canary, seed, stale=0.0, bias=bias), [canary], tolerance=TOLERANCE).accepted


@pytest.mark.parametrize("seed", range(20))
def test_the_sign_test_detects_previous_weights_within_the_tolerance(seed: int) -> None:
    canary = a_canary(seed, move=0.008)
    verdict = judge(scores(canary, seed, stale=0.7), [canary], tolerance=TOLERANCE)
    assert verdict.error < TOLERANCE, "the mean alone would accept it"
    assert verdict.leaning > LEANING
    assert not verdict.accepted
    assert "lean toward the previous weights" in verdict.reason()


def test_a_large_error_is_refused_even_without_a_previous_version() -> None:
    canary = Canary((1, 2, 3), (1, 2), (-1.0, -2.0), previous=())
    verdict = judge([[-1.1, -2.2]], [canary], tolerance=0.1)
    assert verdict.error == pytest.approx(0.15)
    assert verdict.leaning == 0.0
    assert not verdict.accepted
    assert "canary error 0.1500 nats exceeds the tolerance 0.1 nats" in verdict.reason()


def test_the_leaning_is_a_sign_test() -> None:
    """Worked by hand: four tokens count, three toward and one away: (3 - 1) / sqrt(4) = 1."""
    canary = Canary((0, 1, 2, 3, 4, 5, 6), (1, 2, 3, 4, 5, 6), (-1.0,) * 6, (-0.9, -0.9, -1.1, -0.9, -1.0, -0.9))
    #        toward, toward, toward, away, unmoved, below MATERIAL
    verdict = judge([[-0.95, -0.95, -1.05, -1.05, -0.9, -0.99]], [canary], tolerance=1.0)
    assert verdict.leaning == pytest.approx(1.0)


@pytest.mark.parametrize("score", [[-1.0], [], [-1.0, math.nan], [-1.0, math.inf], [-1.0, -math.inf]])
def test_missing_or_meaningless_scores_are_refused(score: list[float]) -> None:
    canary = Canary((1, 2, 3), (1, 2), (-1.0, -2.0), previous=(-1.0, -2.0))
    verdict = judge([score], [canary], tolerance=10.0)
    assert verdict.error == math.inf
    assert not verdict.accepted


def test_a_version_without_anything_to_compare_is_refused() -> None:
    assert not judge([], [], tolerance=10.0).accepted
