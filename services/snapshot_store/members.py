"""The names of workers and replicas in use, each held by one process. Pure.

Two workers of one name would be one member of the consumer group and one source of heartbeats. A name is held for
`LEASE_S` seconds after it was last taken. kept_members.py keeps the names over a restart of the store.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from msgspec import Struct

LEASE_S = 15.0
"""Time for which a name is held after it was last taken, in seconds."""


class NameHolder(Struct, frozen=True, forbid_unknown_fields=True):
    """The process that holds a name."""

    instance: str
    """Names the process; different for each start."""
    holder: str
    """The process in words."""


@dataclass(frozen=True, slots=True)
class Member:
    """A holder and its lease."""

    process: NameHolder
    renewals: int
    """Number of times that it has taken the name again."""
    until: float


class NameTaken(Exception):
    """Another process holds the name."""

    def __init__(self, name: str, member: Member) -> None:
        super().__init__(f"{name} is held by {member.process.holder}")
        self.member = member


class Members:
    """Gives each name to one process at a time. `clock`: seconds.

    >>> members = Members(clock=lambda: 0.0)
    >>> members.take("rollout/worker-0", "a", "host 1"), members.take("rollout/worker-0", "a", "host 1")
    (None, None)
    >>> members.take("rollout/worker-0", "b", "host 2")
    Traceback (most recent call last):
    palimpsest.services.snapshot_store.members.NameTaken: rollout/worker-0 is held by host 1
    >>> members.take("rollout/worker-0", "b", "host 2", replaces="a")
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._members: dict[str, Member] = {}

    def take(self, name: str, instance: str, holder: str, *, replaces: str = "") -> None:
        """Give the name to this instance, or renew it. `replaces`: an instance that has ended. Raises NameTaken."""
        now = self._clock()
        self._members = {taken: member for taken, member in self._members.items() if member.until > now}
        current = self._members.get(name)
        if current is not None and current.process.instance not in (instance, replaces):
            raise NameTaken(name, current)
        renewals = current.renewals + 1 if current is not None and current.process.instance == instance else 0
        self._members[name] = Member(NameHolder(instance, holder), renewals, now + LEASE_S)

    def release(self, name: str, instance: str) -> None:
        """Free the name, if this instance holds it."""
        if (current := self._members.get(name)) is not None and current.process.instance == instance:
            del self._members[name]

    def holders(self) -> dict[str, NameHolder]:
        """Return the holder of each name whose lease was not over at the last `take`."""
        return {name: member.process for name, member in self._members.items()}

    def restore(self, holders: Mapping[str, NameHolder]) -> None:
        """Hold these names for a full lease from now on."""
        until = self._clock() + LEASE_S
        self._members = {name: Member(holder, 0, until) for name, holder in holders.items()}
