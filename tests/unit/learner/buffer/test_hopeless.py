"""A run ends if no batch can be expected."""

import pytest

from palimpsest.common.user_error import UserError
from palimpsest.services.learner.buffer.hopeless import EVEN_BUDGETS, refuse_even, refuse_hopeless


def test_a_run_whose_groups_all_have_equal_rewards_ends_with_the_key_to_change() -> None:
    refuse_even(EVEN_BUDGETS * 8 - 1, admitted=8)
    with pytest.raises(UserError, match=r'160 trajectories were dropped .* learner\.even_groups = "keep"'):
        refuse_even(EVEN_BUDGETS * 8, admitted=8)


def test_a_run_in_which_everything_is_dropped_ends_unless_a_trajectory_waits() -> None:
    refuse_hopeless(15, admitted=8, waiting=0, reasons={})
    refuse_hopeless(16, admitted=8, waiting=1, reasons={})
    with pytest.raises(UserError, match="engine_failed"):
        refuse_hopeless(16, admitted=8, waiting=0, reasons={"engine_failed": 16})


def test_prompts_that_are_too_long_are_named_with_the_key_to_change() -> None:
    with pytest.raises(UserError, match=r"Raise sampling\.max_trajectory_tokens"):
        refuse_hopeless(16, admitted=8, waiting=0, reasons={"prompt_too_long": 16})
    with pytest.raises(UserError, match="usually the environment or its gateway"):
        refuse_hopeless(16, admitted=8, waiting=0, reasons={"prompt_too_long": 15, "engine_failed": 1})


def test_the_error_holds_what_the_last_worker_said() -> None:
    detail = "the first observation has 1130 tokens,\nbut sampling.max_trajectory_tokens is 96"
    with pytest.raises(UserError, match=r"The last one: the first observation has 1130 tokens, but .* is 96\. The "):
        refuse_hopeless(16, admitted=8, waiting=0, reasons={"prompt_too_long": 16}, detail=detail)
    with pytest.raises(UserError, match=r"'engine_failed': 16}\. The workers"):
        refuse_hopeless(16, admitted=8, waiting=0, reasons={"engine_failed": 16})
