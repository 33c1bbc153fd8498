"""Which deaths of ranks lead to another start."""

import pytest

from palimpsest.common.user_error import ExitCode
from palimpsest.services.learner.restarts.deaths import PastDeath, why_not_again

KILLED = PastDeath(-9, 4)


@pytest.mark.parametrize("code", [-9, -11, 1, 143])
def test_ranks_start_again_after_a_crash(code: int) -> None:
    assert why_not_again(code, [PastDeath(code, 4)], left=1, allowed=1) == ""


@pytest.mark.parametrize("code", [2, 3, 4, 5, 6])
def test_ranks_do_not_start_again_after_an_error_that_would_return(code: int) -> None:
    assert why_not_again(code, [], left=9, allowed=9).startswith("another start would end in the same way")


@pytest.mark.parametrize("code", [ExitCode.STOPPED, ExitCode.INTERRUPTED])
def test_ranks_do_not_start_again_after_a_stop(code: int) -> None:
    assert why_not_again(code, [], left=9, allowed=9) == "the run was stopped, and can continue"


@pytest.mark.parametrize(
    ("past", "ends"),
    [
        ([KILLED] * 2, False),
        ([KILLED] * 3, True),
        ([KILLED, PastDeath(-9, 5), PastDeath(-9, 5)], False),
        ([KILLED, PastDeath(1, 4), KILLED], False),
        ([PastDeath(1, 3), KILLED, KILLED, KILLED], True),
    ],
)
def test_three_equal_deaths_without_a_checkpoint_in_between_end_the_run(past: list[PastDeath], ends: bool) -> None:
    assert bool(why_not_again(-9, past, left=5, allowed=9)) is ends


def test_without_restarts_the_run_ends() -> None:
    assert why_not_again(1, [], left=0, allowed=3) == "all 3 restarts of --max-restarts are used up"
