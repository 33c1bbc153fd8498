"""The trajectories of a group, until all have ended, and the ids of groups and trajectories. Pure."""

import re
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from palimpsest.common.messages import group_id, trajectory_id
from palimpsest.common.versions import Version

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ReadyGroup(Generic[T]):
    """The trajectories of a complete group."""

    group: str
    items: list[T]
    """To train on: at least one token is inside the staleness bound, or no token was sampled."""
    stale: list[T] = field(default_factory=list)
    """Every token is too old: only their rewards count, in the baseline of the group."""


@dataclass(frozen=True, slots=True)
class Finished(Generic[T]):
    """A finished trajectory."""

    item: T
    newest: Version | None
    """Version of its newest token; None if no token was sampled, so that it is never too stale."""

    def is_stale(self, lowest: int) -> bool:
        """Whether every token is of a version below `lowest`."""
        return self.newest is not None and self.newest < lowest


@dataclass
class Group(Generic[T]):
    """A group with a trajectory that has not ended."""

    index: int
    samples: int
    offered_at: float
    time_limit_s: float
    """Seconds from the offer, after which awaited trajectories are dropped."""
    arrived: dict[int, Finished[T]] = field(default_factory=dict)
    """Sample -> trajectory that waits for the training."""
    ended: dict[int, str] = field(default_factory=dict)
    """Sample -> its end."""

    @property
    def pending(self) -> int:
        """Number of trajectories that have not ended."""
        return self.samples - len(self.ended)

    @property
    def awaited(self) -> list[int]:
        """Samples that have neither arrived nor ended."""
        return [s for s in range(self.samples) if s not in self.arrived and s not in self.ended]

    def ready(self, lowest: int) -> ReadyGroup[T]:
        """Split the arrived trajectories by whether a token is of version `lowest` or later."""
        arrived = [self.arrived[sample] for sample in sorted(self.arrived)]
        return ReadyGroup(
            group_id(self.index),
            [one.item for one in arrived if not one.is_stale(lowest)],
            [one.item for one in arrived if one.is_stale(lowest)],
        )


_ID = re.compile(r"g([0-9]{1,18})/([0-9]{1,18})")
"""Ids of a run are shorter. The limit is needed because int() raises on thousands of digits in a malformed record."""


def parse_id(trajectory: str) -> tuple[str, int]:
    """Group and sample of a trajectory id; ("", -1) unless it is written as `trajectory_id` writes it."""
    if (match := _ID.fullmatch(trajectory)) is None:
        return "", -1
    group, sample = group_id(int(match[1])), int(match[2])
    return (group, sample) if trajectory == trajectory_id(group, sample) else ("", -1)
