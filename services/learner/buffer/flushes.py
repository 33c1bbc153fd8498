"""Unscored flushes of live trajectories, by trajectory, those of its branches included. Pure.

The next flush of a trajectory contains all tokens of the earlier flush, so only the last flush is kept. When
a trajectory is sampled twice, by a worker that was presumed dead and by its successor, neither flush contains the
other.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from palimpsest.common.arrays import unpack_int32
from palimpsest.common.branches import trajectory_of
from palimpsest.common.messages import SegmentFlushed
from palimpsest.common.trajectory import token_versions

SAMPLINGS = 8
"""Maximum number of flushes kept of one token sequence. Each worker that samples it again adds one."""


@dataclass(frozen=True, slots=True)
class Flushed:
    """A flush and its position on the log."""

    record: SegmentFlushed
    partition: int
    offset: int


class FlushBuffer:
    """The flushes in memory. `add` and `forget` return the flushes that need not be scored."""

    def __init__(self) -> None:
        self._kept: dict[str, list[Flushed]] = {}

    def __iter__(self) -> Iterator[Flushed]:
        return (flushed for kept in self._kept.values() for flushed in kept)

    def __len__(self) -> int:
        return sum(map(len, self._kept.values()))

    def of(self, trajectory: str) -> list[Flushed]:
        """The flushes of one trajectory and its branches, in the order of arrival."""
        return list(self._kept.get(trajectory_of(trajectory), ()))

    def add(self, new: Flushed) -> list[Flushed]:
        """Keep a flush. Return the flushes that it replaces, or the flush itself if a kept one contains all of it.

        Beyond SAMPLINGS flushes of one sequence the oldest is replaced, so that no flood of them fills the memory.
        """
        name = new.record.trajectory
        kept = self._kept.setdefault(trajectory_of(name), [])
        same = [other for other in kept if other.record.trajectory == name]
        if any(_contains(other.record, new.record) for other in same):
            return [new]
        needless = [other for other in same if _contains(new.record, other.record)]
        needless += [other for other in same if other not in needless][: -(SAMPLINGS - 1)]
        self._kept[trajectory_of(name)] = [other for other in kept if other not in needless] + [new]
        return needless

    def remove(self, flushed: Flushed) -> None:
        """Remove a flush that was scored. Does nothing if it is not kept."""
        kept = [other for other in self.of(flushed.record.trajectory) if other != flushed]
        if kept:
            self._kept[trajectory_of(flushed.record.trajectory)] = kept
        else:
            self._kept.pop(trajectory_of(flushed.record.trajectory), None)

    def forget(self, trajectory: str) -> list[Flushed]:
        """Remove and return all flushes of a trajectory that has ended."""
        return self._kept.pop(trajectory, [])


def _contains(longer: SegmentFlushed, shorter: SegmentFlushed) -> bool:
    """Whether `longer` starts with all of `shorter`: the same tokens, sampled by the same versions."""
    if not longer.tokens.startswith(shorter.tokens):
        return False
    length = len(unpack_int32(shorter.tokens))
    return np.array_equal(
        token_versions(longer.segments, len(unpack_int32(longer.tokens)))[:length],
        token_versions(shorter.segments, length),
    )
