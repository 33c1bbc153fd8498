"""The run counted anew, id by id. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass

from palimpsest.common.text import count
from palimpsest.services.audit.evidence import LoggedRecord, Offer


@dataclass(frozen=True, slots=True)
class Recount:
    """What log, history and the ledger's open groups say of each trajectory."""

    offers: Mapping[str, Offer]
    """Group -> its offer, of the groups that the ledger knows."""
    offered: frozenset[str]
    """Ids of these groups."""
    trained: frozenset[str]
    pending: frozenset[str]
    """Of open groups, without an end."""
    ended_open: Mapping[str, str]
    """Of open groups, with an end -> how."""
    heard: Mapping[str, tuple[LoggedRecord, ...]]
    """Id -> its records on the log that were not buried."""
    letters: frozenset[str]
    """Ids that a dead letter names."""
    buried: frozenset[tuple[int, int]]
    """Positions on `trajectories` of which there is a dead letter."""

    @property
    def otherwise(self) -> frozenset[str]:
        """Ids that ended, but not by being trained on."""
        return self.offered - self.trained - self.pending

    @property
    def arrived(self) -> frozenset[str]:
        """Pending ids that are on the log: they wait to be trained on."""
        return frozenset(name for name in self.pending if name in self.heard)

    @property
    def repeats(self) -> int:
        """Records of trajectories that had come before."""
        return sum(len(records) - 1 for records in self.heard.values())


def trajectories(number: int) -> str:
    """So many, in words.

    >>> trajectories(1), trajectories(3)
    ('1 trajectory', '3 trajectories')
    """
    return count(number, "trajectory", "trajectories")
