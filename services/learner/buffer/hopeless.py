"""Ends a run whose trajectories are all dropped: another batch would not come."""

from collections.abc import Mapping

from palimpsest.common.messages import DropReason
from palimpsest.common.user_error import ExitCode, UserError

EVEN_BUDGETS = 20
"""The run ends if this many times the admitted number of trajectories were dropped since the last batch because the
rewards of their groups are equal."""
HOPELESS_BUDGETS = 2
"""The run ends if this many times the admitted number of trajectories were dropped and none arrived."""


LONGEST_DETAIL = 300
"""Characters of a worker's text in the error."""


def refuse_hopeless(dropped: int, *, admitted: int, waiting: int, reasons: Mapping[str, int], detail: str = "") -> None:
    """Raise UserError if no trajectory waits and too many were dropped.

    dropped: number since the last batch. admitted: number that may be in flight. reasons: totals of the run.
    detail: why a worker dropped the last of them.
    """
    if dropped >= HOPELESS_BUDGETS * admitted and not waiting:
        cause = "the reasons (usually the environment or its gateway). Fix the cause"
        if set(reasons) == {DropReason.PROMPT_TOO_LONG.value}:
            cause = (
                "their lengths. Raise sampling.max_trajectory_tokens, with a model whose context is as long, or choose "
                "an environment with a shorter first message"
            )
        last = f"The last one: {' '.join(detail.split())[:LONGEST_DETAIL]}. " if detail else ""
        raise UserError(
            f"{dropped} trajectories in a row were dropped and none arrived: {dict(reasons)}. {last}The workers' logs "
            f"hold {cause}, and continue with --resume",
            ExitCode.UNAVAILABLE,
        )


def refuse_even(dropped: int, *, admitted: int) -> None:
    """Raise UserError if too many trajectories were dropped because the rewards of their groups are equal.

    dropped: number since the last batch. admitted: number that may be in flight.
    """
    if dropped >= EVEN_BUDGETS * admitted:
        raise UserError(
            f"{dropped} trajectories were dropped since the last batch because all rewards of their groups are equal: "
            f"the tasks are all solved or all failed. Choose tasks of another difficulty, or set "
            f'learner.even_groups = "keep"',
            ExitCode.UNAVAILABLE,
        )
