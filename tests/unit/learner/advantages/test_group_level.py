"""Group-level advantages: one value per trajectory, checked against the worked values of algorithms.md, section 8."""

import doctest
from types import ModuleType
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, strategies as st

from palimpsest.common.config.objective import AdvantageConfig
from palimpsest.services.learner.advantages import (
    ESTIMATORS,
    dr_grpo,
    group_advantages,
    group_level,
    grpo,
    reinforce,
    rloo,
    trainable_tokens,
)

REWARDS = [1.0, 0.0, 0.0, 1.0]
rewards = st.lists(st.floats(0, 1), min_size=2, max_size=16)


@pytest.mark.parametrize(("kind", "value"), [("grpo", 0.86602), ("dr_grpo", 0.5), ("rloo", 0.66667)])
def test_worked_example(kind: str, value: float) -> None:
    assert group_advantages(kind, REWARDS) == pytest.approx([value, -value, -value, value], abs=1e-5)


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo", "reinforce_pp_baseline"])
@pytest.mark.parametrize("reward", [0.0, 0.1, 0.3, 1 / 3, 1.0])
@pytest.mark.parametrize("size", [2, 3, 5, 10])
def test_18_13_equal_rewards_give_zero_advantages(kind: str, reward: float, size: int) -> None:
    """Exactly zero: no rounding error divided by a deviation of 1e-17 + 1e-6 remains."""
    assert group_advantages(kind, [reward] * size) == [0.0] * size


@given(rewards)
def test_18_13_rloo_subtracts_the_mean_of_the_other_rewards(values: list[float]) -> None:
    expected = [r - np.mean(values[:i] + values[i + 1 :]) for i, r in enumerate(values)]
    assert group_advantages("rloo", values) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo", "reinforce_pp_baseline"])
@given(values=rewards)
def test_advantages_of_a_group_sum_to_zero(kind: str, values: list[float]) -> None:
    assert sum(group_advantages(kind, values)) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("kind", ["reinforce_pp", "gae"])
def test_kinds_without_a_baseline_return_the_rewards_unchanged(kind: str) -> None:
    assert group_advantages(kind, REWARDS) == REWARDS
    assert group_advantages(kind, [0.25]) == [0.25]


def test_reinforce_subtracts_the_mean_of_the_group() -> None:
    assert group_advantages("reinforce_pp_baseline", [1.0, 0.0, 0.5, 0.5]) == [0.5, -0.5, 0.0, 0.0]


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo", "reinforce_pp_baseline"])
def test_a_group_of_one_has_no_baseline(kind: str) -> None:
    with pytest.raises(ValueError, match="group of 1 has no baseline"):
        group_advantages(kind, [1.0])


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown kind of advantages 'remax'; use one of grpo, dr_grpo, rloo"):
        group_advantages("remax", REWARDS)


def test_every_configured_kind_has_an_estimator() -> None:
    assert set(get_args(AdvantageConfig.model_fields["kind"].annotation)) == set(ESTIMATORS)
    assert (ESTIMATORS["grpo"], ESTIMATORS["dr_grpo"], ESTIMATORS["rloo"]) == (grpo, dr_grpo, rloo)


@pytest.mark.parametrize("module", [group_level, trainable_tokens, reinforce], ids=lambda m: m.__name__)
def test_examples_in_docstrings_hold(module: ModuleType) -> None:
    results = doctest.testmod(module)
    assert (results.failed, results.attempted > 0) == (0, True)
