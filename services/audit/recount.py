"""The recount of a run by trajectory id. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass

from palimpsest.common.text import count
from palimpsest.services.audit.evidence import LoggedRecord, Offer


@dataclass(frozen=True, slots=True)
class Recount:
    """Trajectory ids by their state in log, history and the ledger's open groups."""

    offers: Mapping[str, Offer]
    """Group -> its offer, of the groups that the ledger includes."""
    offered: frozenset[str]
    """Trajectory ids of these groups."""
    trained: frozenset[str]
    pending: frozenset[str]
    """Ids of open groups without an end."""
    ended_open: Mapping[str, str]
    """Id -> end, of open groups."""
    arrivals: Mapping[str, tuple[LoggedRecord, ...]]
    """Id -> its records on the log, without dead-lettered ones."""
    letters: frozenset[str]
    """Ids in dead letters."""
    buried: frozenset[tuple[int, int]]
    """Positions on `trajectories` that have a dead letter."""

    @property
    def otherwise(self) -> frozenset[str]:
        """Ids that ended without training."""
        return self.offered - self.trained - self.pending

    @property
    def arrived(self) -> frozenset[str]:
        """Pending ids with a record on the log: they wait for training."""
        return frozenset(name for name in self.pending if name in self.arrivals)

    @property
    def repeats(self) -> int:
        """Number of records of trajectories that have an earlier record."""
        return sum(len(records) - 1 for records in self.arrivals.values())


def trajectories(number: int) -> str:
    """Return the number with its noun.

    >>> trajectories(1), trajectories(3)
    ('1 trajectory', '3 trajectories')
    """
    return count(number, "trajectory", "trajectories")
