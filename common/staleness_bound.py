"""The staleness bound of a run, of which people may change the number while the run is running. Pure.

A new number S holds from the version w at which it was set, with two limits that keep what was promised before:

- No version is admitted that was outside the bound at w: the store may have removed its weights.
- A lower S waits for the groups that were offered before. Under the number P that held until w, the learner trains on
  them up to version w + P. Up to then P stays allowed. So the change drops no trajectory; only the admission of new
  groups shrinks at once.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from palimpsest.common.versions import Version


@dataclass(frozen=True, slots=True)
class _Change:
    at: Version
    number: int
    promised: int
    """Number that holds for the groups that were offered before."""
    floor: int
    """Lowest version inside the bound when the change was made."""

    @property
    def until(self) -> int:
        """Last version at which the groups that were offered before are trained on."""
        return self.at + self.promised

    def lowest(self, version: Version) -> int:
        allowed = max(self.number, self.promised) if version <= self.until else self.number
        return max(version - allowed, self.floor)


class StalenessBound:
    """The lowest version whose tokens may be trained on, at each version of a run.

    >>> bound = StalenessBound(4, [(10, 6), (20, 1)])
    >>> [bound.lowest(Version(now)) for now in (9, 10, 11, 12, 13, 20, 26, 27)]
    [5, 6, 6, 6, 7, 14, 20, 26]
    """

    def __init__(self, number: int, changes: Iterable[tuple[int, int]] = ()) -> None:
        """number: learner.max_staleness of the run file. changes: version, new number; in their order."""
        self._first = self.number = number
        """`number`: the newest one."""
        self._changes: list[_Change] = []
        for version, later in changes:
            at, promised = Version(version), self.number
            if self._changes and at <= self._changes[-1].until:
                promised = max(promised, self._changes[-1].promised)
            self._changes.append(_Change(at, later, promised, self.lowest(at)))
            self.number = later

    def lowest(self, version: Version) -> Version:
        """Return the lowest version inside the bound when the learner trains at `version`."""
        for change in reversed(self._changes):
            if change.at <= version:
                return Version(change.lowest(version))
        return Version(version - self._first)

    def allowed(self, version: Version) -> int:
        """Return the highest staleness inside the bound when the learner trains at `version`."""
        return version - self.lowest(version)
