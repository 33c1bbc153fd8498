"""The held-out tasks of an evaluation, and the ids of its groups. Pure.

Ids of evaluations have their own form, `e000012-000003/1`: version, number of the task, sample. The ledger of the
training has no such ids, so it accepts no trajectory of an evaluation.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from palimpsest.common.versions import Version

FIRST_SEED = 2**31
"""First task seed. The training draws smaller ones, so an environment that draws its tasks from the seed gives tasks
that are not trained on."""
_GROUP = re.compile(r"e([0-9]{6,18})-([0-9]{6,18})")
_TRAJECTORY = re.compile(rf"({_GROUP.pattern})/([0-9]{{1,9}})")


@dataclass(frozen=True, slots=True)
class HeldOutTask:
    """One task."""

    environment: str
    seed: int


def held_out_tasks(environments: Sequence[str], number: int, *, seed: int = 0) -> tuple[HeldOutTask, ...]:
    """Return `number` tasks of each environment: always the same ones, so that versions can be compared.

    seed: shifts the task seeds.

    >>> [(task.environment, task.seed - FIRST_SEED) for task in held_out_tasks(["a", "b"], 2)]
    [('a', 0), ('a', 1), ('b', 0), ('b', 1)]
    """
    return tuple(HeldOutTask(name, FIRST_SEED + seed + n) for name in environments for n in range(number))


def evaluation_group(version: Version, number: int) -> str:
    """Return the id of the group of a task.

    >>> evaluation_group(Version(12), 3)
    'e000012-000003'
    """
    return f"e{version:06d}-{number:06d}"


def is_evaluation(group: str) -> bool:
    """Return whether the id is that of an evaluation's group.

    >>> is_evaluation("e000012-000003"), is_evaluation("g000012")
    (True, False)
    """
    return _GROUP.fullmatch(group) is not None


def parse_group(group: str) -> tuple[Version, int] | None:
    """Return version and number of the task; None unless the id is written as `evaluation_group` writes it."""
    if (match := _GROUP.fullmatch(group)) is None:
        return None
    version, number = Version(int(match[1])), int(match[2])
    return (version, number) if group == evaluation_group(version, number) else None


def parse_sample(trajectory: str) -> tuple[str, int] | None:
    """Return group and sample of a trajectory; None unless it is one of an evaluation.

    >>> parse_sample("e000012-000003/1"), parse_sample("g000012/1")
    (('e000012-000003', 1), None)
    """
    match = _TRAJECTORY.fullmatch(trajectory)
    if match is None or parse_group(match[1]) is None or str(int(match[4])) != match[4]:
        return None
    return match[1], int(match[4])
