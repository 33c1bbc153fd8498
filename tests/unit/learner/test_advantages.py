"""Worked values of algorithms.md, section 8."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.learner.advantages import group_advantages

REWARDS = [1.0, 0.0, 0.0, 1.0]
rewards = st.lists(st.floats(0, 1), min_size=2, max_size=16)


@pytest.mark.parametrize(("kind", "value"), [("grpo", 0.86602), ("dr_grpo", 0.5), ("rloo", 0.66667)])
def test_worked_example(kind: str, value: float) -> None:
    assert group_advantages(kind, REWARDS) == pytest.approx([value, -value, -value, value], abs=1e-5)


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo"])
def test_an_even_group_teaches_nothing(kind: str) -> None:
    assert group_advantages(kind, [0.3] * 5) == pytest.approx([0.0] * 5)


@given(rewards)
def test_rloo_is_the_reward_less_the_mean_of_the_others(values: list[float]) -> None:
    expected = [r - np.mean(values[:i] + values[i + 1 :]) for i, r in enumerate(values)]
    assert group_advantages("rloo", values) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo"])
@given(values=rewards)
def test_advantages_of_a_group_cancel(kind: str, values: list[float]) -> None:
    assert sum(group_advantages(kind, values)) == pytest.approx(0.0, abs=1e-6)


def test_a_group_of_one_has_no_baseline() -> None:
    with pytest.raises(ValueError, match="group of 1 has no baseline"):
        group_advantages("grpo", [1.0])
