"""Branches: further token sequences of one session, which an agent program causes when it rewrites its past.

A session of an agent has one reward and one record, `TrajectoryFinished`. The record's own tokens are the first
sequence; `branches` has the others. In the learner each sequence is a row, named by `branch_name`, with the advantage
of its session: the ledger, the baseline of the group and the audit count the session once (docs/decisions/0032).
"""

from typing import TYPE_CHECKING

from msgspec import Struct, structs

from palimpsest.common.trajectory import Segment

if TYPE_CHECKING:
    from palimpsest.common.messages import TrajectoryFinished

MARK = "+"


class Branch(Struct, frozen=True, forbid_unknown_fields=True):
    """A further token sequence of a trajectory. No segment covers what an earlier sequence has in common with it."""

    number: int
    """From 1, in the order in which the branches began."""
    tokens: bytes
    """int32: see TrajectoryFinished."""
    segments: tuple[Segment, ...]
    turns: int
    """Number of model messages that were sampled in this branch."""


def branch_name(trajectory: str, number: int) -> str:
    """Return the name of a branch; number 0 is the trajectory itself.

    >>> branch_name("g000007/3", 2)
    'g000007/3+2'
    """
    return f"{trajectory}{MARK}{number}" if number else trajectory


def trajectory_of(name: str) -> str:
    """Return the trajectory of a branch.

    >>> trajectory_of("g000007/3+2"), trajectory_of("g000007/3")
    ('g000007/3', 'g000007/3')
    """
    return name.partition(MARK)[0]


def sequences(record: "TrajectoryFinished") -> "tuple[TrajectoryFinished, ...]":
    """Return a record for each token sequence of a trajectory, named by `branch_name`, without further branches."""
    if not record.branches:
        return (record,)
    return (
        structs.replace(record, branches=()),
        *(
            structs.replace(
                record,
                trajectory=branch_name(record.trajectory, branch.number),
                tokens=branch.tokens,
                segments=branch.segments,
                turns=branch.turns,
                branches=(),
            )
            for branch in record.branches
        ),
    )
