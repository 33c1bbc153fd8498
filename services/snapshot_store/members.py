"""The names of workers and replicas in use, each held by one process. Pure.

Two workers of one name would be one member of the consumer group and one source of heartbeats. A name is held for
`LEASE_S` seconds after it was last taken; a restart of the store forgets all names, and their holders take them again.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

LEASE_S = 15.0
"""Time for which a name is held after it was last taken, in seconds."""


@dataclass(frozen=True, slots=True)
class Member:
    """The process that holds a name."""

    instance: str
    """Names the process; different for each start."""
    holder: str
    """The process in words."""
    renewals: int
    """Number of times that it has taken the name again."""
    until: float


class NameTaken(Exception):
    """Another process holds the name."""

    def __init__(self, name: str, member: Member) -> None:
        super().__init__(f"{name} is held by {member.holder}")
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
        if current is not None and current.instance not in (instance, replaces):
            raise NameTaken(name, current)
        renewals = current.renewals + 1 if current is not None and current.instance == instance else 0
        self._members[name] = Member(instance, holder, renewals, now + LEASE_S)

    def release(self, name: str, instance: str) -> None:
        """Free the name, if this instance holds it."""
        if (current := self._members.get(name)) is not None and current.instance == instance:
            del self._members[name]
