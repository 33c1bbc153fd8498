"""How ranks of the learner ended, and whether they start again. Pure."""

import signal
from collections.abc import Mapping, Sequence

from msgspec import Struct

from palimpsest.common.user_error import ExitCode

FROM_SIGNAL = 128
"""A shell reports a process that signal N ended as 128 + N."""
OWN_CODES = frozenset(code for code in ExitCode if code not in (ExitCode.DONE, ExitCode.CRASHED))
FINAL = frozenset(
    (
        ExitCode.CONFIGURATION,
        ExitCode.UNAVAILABLE,
        ExitCode.DAMAGED,
        ExitCode.CANARY,
        ExitCode.REPLACED,
        ExitCode.STOPPED,
        ExitCode.INTERRUPTED,
    )
)
"""Exit codes after which the ranks do not start again: they would end in the same way, or the run was stopped."""
STOPPED = "the run was stopped, and can continue"
SAME = 3
"""This number of equal deaths in a row, without a new checkpoint in between, ends the run."""


class RankDeath(Struct, frozen=True, forbid_unknown_fields=True):
    """What ended the ranks of a round."""

    code: int
    """Exit code of the rank that ended the others, negative for a signal."""
    text: str
    """Which rank, where and how."""


class LearnerEnding(Struct, frozen=True, forbid_unknown_fields=True):
    """Why the ranks do not start again."""

    code: int
    """Exit code of every launcher."""
    text: str


class PastDeath(Struct, frozen=True):
    """A death, and the newest committed checkpoint at that time; None if the run had none."""

    code: int
    checkpoint: int | None


def decisive(failures: Mapping[int, tuple[int, int]]) -> int:
    """Return the rank that ended the others.

    failures: of each failed rank, the time of its failure in seconds and its exit code, negative for a signal. The
    first code that the learner documents counts, because a rank that loses its connection to another one crashes too.
    Of one second SIGTERM counts last: torchrun sends it to the other ranks.

    >>> decisive({0: (5, 1), 1: (6, 4)}), decisive({0: (6, 1), 1: (5, -9)})
    (1, 1)
    """
    by_age = sorted(
        failures, key=lambda rank: (failures[rank][0], _from_launcher(failures[rank][1]), failures[rank][1])
    )
    return next((rank for rank in by_age if failures[rank][1] in OWN_CODES), by_age[0])


def _from_launcher(code: int) -> bool:
    return code == -signal.SIGTERM


def shell_code(code: int) -> int:
    """Return the code as a shell reports it.

    >>> shell_code(2), shell_code(-9)
    (2, 137)
    """
    return FROM_SIGNAL - code if code < 0 else code


def describe(rank: int, host: str, code: int) -> str:
    """Return a clause: which rank ended, and how.

    >>> describe(1, "b", -9), describe(0, "a", 1)
    ('rank 1 (on b) was ended by SIGKILL', 'rank 0 (on a) ended with exit code 1')
    """
    if code >= 0:
        return f"rank {rank} (on {host}) ended with exit code {code}"
    known = {number.value: number.name for number in signal.Signals}
    return f"rank {rank} (on {host}) was ended by {known.get(-code, f'signal {-code}')}"


def describe_leaving(leaving: int, nodes: int) -> str:
    """Return a clause about the nodes whose launchers end.

    >>> describe_leaving(1, 2)
    '1 of 2 nodes received a signal to end'
    """
    return f"{leaving} of {nodes} nodes received a signal to end"


def why_not_again(code: int, past: Sequence[PastDeath], *, left: int, allowed: int) -> str:
    """Return why the ranks do not start again; empty if they do.

    past: all deaths, this one last; [] if this launcher cannot see the checkpoints. left: restarts that are left of
    those `allowed` by --max-restarts.

    >>> why_not_again(-9, [], left=0, allowed=3)
    'all 3 restarts of --max-restarts are used up'
    >>> why_not_again(-9, [PastDeath(-9, 4)] * 2, left=1, allowed=3)
    ''
    """
    if code in (ExitCode.STOPPED, ExitCode.INTERRUPTED):
        return STOPPED
    if code in FINAL:
        return "another start would end in the same way; the rank states the cause"
    newest = past[-SAME:]
    if len(newest) == SAME and all(one == newest[-1] for one in newest):
        since = "its start" if newest[-1].checkpoint is None else f"the checkpoint of version {newest[-1].checkpoint}"
        return f"the run died {SAME} times in the same way since {since}: another start would too"
    return "" if left > 0 else f"all {allowed} restarts of --max-restarts are used up"
