"""Decides whether and when a process that died is restarted. Pure.

Invariant: a process that dies repeatedly without having worked in between is restarted at most `local.restarts` times,
and at most twice if it always dies in the same way. Every crash loop therefore ends, for any duration of a start. A
process that has worked (see services/local/process_start.py) starts a new row of deaths.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

SAME = 3
"""This number of equal deaths in a row ends the run."""
LONGEST_WAIT_S = 30.0


@dataclass(frozen=True, slots=True)
class Death:
    """The end of one start of a process."""

    exit_code: int
    """Negative: the signal that ended it."""
    error: str
    """The last error in its log since its start."""
    worked: bool
    """Whether the process worked before it died."""

    def is_same_failure(self, other: "Death") -> bool:
        """Whether both died in the same way; numbers in the error (process ids, addresses, times) may differ.

        >>> Death(1, "OSError: port 4711", False).is_same_failure(Death(1, "OSError: port 4712", False))
        True
        """
        return (self.exit_code, _without_numbers(self.error)) == (other.exit_code, _without_numbers(other.error))


def append_death(row: Sequence[Death], death: Death) -> tuple[Death, ...]:
    """Return the row of deaths with this one appended. A death after work starts a new row."""
    return (death,) if death.worked else (*row, death)


def is_crash_loop(row: Sequence[Death]) -> bool:
    """Whether the newest deaths are equal, so that another start would fail in the same way."""
    return len(row) >= SAME and all(death.is_same_failure(row[-1]) for death in row[-SAME:])


def restart_delay_s(row: Sequence[Death], *, restarts: int) -> float | None:
    """Return the seconds until the next start, or None if there is none. restarts: local.restarts.

    >>> killed, raised = Death(-9, "", False), Death(1, "ValueError", False)
    >>> rows = [killed], [killed, killed], [killed, raised, killed], [killed] * 3
    >>> [restart_delay_s(row, restarts=5) for row in rows]
    [0.0, 1.0, 2.0, None]
    """
    if is_crash_loop(row) or len(row) > restarts:
        return None
    return 0.0 if len(row) == 1 else min(LONGEST_WAIT_S, 2.0 ** (len(row) - 2))


def _without_numbers(text: str) -> str:
    return re.sub(r"0x[0-9a-fA-F]+|\d+", "#", text)
