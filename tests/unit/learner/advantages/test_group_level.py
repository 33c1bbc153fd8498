"""One number for each trajectory; worked values of algorithms.md, section 8."""

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
def test_18_13_an_even_group_teaches_nothing(kind: str, reward: float, size: int) -> None:
    """Exactly: a rounding divided by a deviation of 1e-17 + 1e-6 must not remain."""
    assert group_advantages(kind, [reward] * size) == [0.0] * size


@given(rewards)
def test_18_13_rloo_is_the_reward_less_the_mean_of_the_others(values: list[float]) -> None:
    expected = [r - np.mean(values[:i] + values[i + 1 :]) for i, r in enumerate(values)]
    assert group_advantages("rloo", values) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo", "reinforce_pp_baseline"])
@given(values=rewards)
def test_advantages_of_a_group_cancel(kind: str, values: list[float]) -> None:
    assert sum(group_advantages(kind, values)) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("kind", ["reinforce_pp", "gae"])
def test_kinds_without_a_baseline_leave_the_rewards_as_they_are(kind: str) -> None:
    assert group_advantages(kind, REWARDS) == REWARDS
    assert group_advantages(kind, [0.25]) == [0.25]


def test_the_baseline_of_reinforce_is_the_mean_of_the_group() -> None:
    assert group_advantages("reinforce_pp_baseline", [1.0, 0.0, 0.5, 0.5]) == [0.5, -0.5, 0.0, 0.0]


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo", "reinforce_pp_baseline"])
def test_a_group_of_one_has_no_baseline(kind: str) -> None:
    with pytest.raises(ValueError, match="group of 1 has no baseline"):
        group_advantages(kind, [1.0])


def test_a_kind_that_there_is_not_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown kind of advantages 'remax'; use one of grpo, dr_grpo, rloo"):
        group_advantages("remax", REWARDS)


def test_every_kind_of_the_configuration_has_its_estimator() -> None:
    assert set(get_args(AdvantageConfig.model_fields["kind"].annotation)) == set(ESTIMATORS)
    assert (ESTIMATORS["grpo"], ESTIMATORS["dr_grpo"], ESTIMATORS["rloo"]) == (grpo, dr_grpo, rloo)


@pytest.mark.parametrize("module", [group_level, trainable_tokens, reinforce], ids=lambda m: m.__name__)
def test_examples_in_docstrings_hold(module: ModuleType) -> None:
    tried = doctest.testmod(module)
    assert (tried.failed, tried.attempted > 0) == (0, True)
