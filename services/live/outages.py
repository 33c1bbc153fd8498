"""The outages of a run: merges the reports of its services and formats them. Pure."""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from palimpsest.common.outages import GATEWAY, KAFKA, ROOM, S3, STORE
from palimpsest.common.text import duration, listed

SHOWN_S = 3.0
"""Shorter outages are not shown."""
GAP_S = 3.0
"""An outage is over once no service has reported it for this time; the services are polled one after another."""
NAMES = {KAFKA: "Kafka", STORE: "snapshot store", S3: "S3", GATEWAY: "environment gateway", ROOM: ROOM}
MENDS = {
    KAFKA: "Start the broker; the run then continues by itself",
    STORE: "See logs/snapshot_store.log. If its process hangs, end it with kill -9; the run restarts it",
    S3: "Start it; the run then continues by itself",
    GATEWAY: "See logs/env_gateway.log. If its process hangs, end it with kill -9; the run restarts it",
    ROOM: "Release pins (palimpsest pin), or raise snapshot_store.max_gib and resume the run",
}
NEEDS = {
    KAFKA: "every service reads and writes its topics",
    STORE: "learner and workers need it for every version",
    S3: "the store needs it for every version",
    GATEWAY: "the workers need it for every message",
    ROOM: "the learner needs it for every version",
}
"""Which services need it, if none reports a wait yet: a call that hangs is reported late."""
LIMITS = {
    KAFKA: " (bus.outage_limit_s); then the run ends with code 3, and --resume continues it",
    STORE: "; then the run restarts {who}",
    S3: "; then the run restarts {who}",
    GATEWAY: "; then the trajectory is retried in a new session, and dropped after rollout.attempts",
    ROOM: "; then the learner ends with code 3",
}
"""What follows when the wait ends."""


@dataclass(frozen=True, slots=True)
class Outage:
    """A server that the run needs and that does not answer."""

    of: str
    """The name by common/outages.py."""
    address: str
    since: float
    """Unix seconds, like `until`."""
    until: float | None = None
    """Earliest time at which a waiting service stops retrying; None: never."""
    problem: str = ""
    waiting: tuple[str, ...] = ()
    """The services that wait for it."""


@dataclass(frozen=True, slots=True)
class EndedOutage:
    """An outage that is over."""

    of: str
    address: str
    since: float
    ended: float
    """Unix seconds, like `since`."""


def merge(reported: Mapping[str, Iterable[Mapping[str, Any]]], own: Iterable[Outage] = ()) -> tuple[Outage, ...]:
    """Merge the reports of the services (service -> `outages` of its status) with outages seen by this process.

    Of one server, the earliest start and the earliest deadline count. The longest outage comes first.
    """
    found: dict[tuple[str, str], Outage] = {}
    outages = [
        Outage(each["of"], each["address"], each["since"], each.get("until"), each.get("problem", ""), (service,))
        for service, of_service in reported.items()
        for each in of_service
    ]
    for outage in [*outages, *own]:
        key = (outage.of, outage.address)
        known = found.get(key, outage)
        limits = [until for until in (known.until, outage.until) if until is not None]
        found[key] = replace(
            known,
            since=min(known.since, outage.since),
            until=min(limits, default=None),
            problem=known.problem or outage.problem,
            waiting=tuple(dict.fromkeys((*known.waiting, *outage.waiting))),
        )
    return tuple(sorted(found.values(), key=lambda outage: outage.since))


class OutageHistory:
    """The current and past outages of a run.

    >>> history = OutageHistory()
    >>> history.update(10.0, [Outage("Kafka", "k:1", 5.0)])
    >>> history.update(20.0, [])
    >>> history.current, history.past
    ((), (EndedOutage(of='Kafka', address='k:1', since=5.0, ended=10.0),))
    """

    def __init__(self) -> None:
        self.current: tuple[Outage, ...] = ()
        """Current outages that have lasted SHOWN_S."""
        self.past: tuple[EndedOutage, ...] = ()
        """Past outages that were shown, oldest first."""
        self._seen: dict[tuple[str, str], tuple[Outage, float]] = {}
        """Each outage, and when it was last reported."""

    def update(self, now: float, outages: Sequence[Outage]) -> None:
        """Update with the outages reported at `now`, in Unix seconds."""
        for outage in outages:
            key = (outage.of, outage.address)
            earlier = self._seen[key][0].since if key in self._seen else outage.since
            self._seen[key] = (replace(outage, since=min(earlier, outage.since)), now)
        for key, (outage, last) in list(self._seen.items()):
            if now - last > GAP_S:
                del self._seen[key]
                if last - outage.since >= SHOWN_S:
                    self.past += (EndedOutage(outage.of, outage.address, outage.since, last),)
        self.current = tuple(outage for outage, _ in self._seen.values() if now - outage.since >= SHOWN_S)


def place(outage: Outage | EndedOutage) -> str:
    """Return the name and address.

    >>> place(Outage("S3", "http://s3:9000", 0.0))
    'S3 at http://s3:9000'
    """
    return f"{NAMES.get(outage.of, outage.of)} at {outage.address}"


def short_text(outage: Outage, now: float) -> str:
    """Return which server does not answer, and since when."""
    return f"no answer from {place(outage)} since {clock(outage.since)} ({duration(now - outage.since)})"


def who_waits(outage: Outage) -> str:
    """Return which services wait for it, and until when."""
    if not outage.waiting:
        return NEEDS.get(outage.of, "no service has waited for it so far")
    who = f"{listed(outage.waiting)} {'waits' if len(outage.waiting) == 1 else 'wait'} for it"
    if outage.until is None:
        return f"{who} without a time limit"
    limit = LIMITS.get(outage.of, "").format(who=listed(outage.waiting))
    return f"{who} until {clock(outage.until)}{limit}"


def remedy(outage: Outage) -> str:
    """Return the remedy."""
    return MENDS.get(outage.of, "Start it")


def full_text(outage: Outage, now: float) -> str:
    """Return all of these texts and the last error."""
    problem = f" ({outage.problem})" if outage.problem else ""
    return f"{short_text(outage, now)}{problem}; {who_waits(outage)}. {remedy(outage)}"


def ended_text(past: EndedOutage) -> str:
    """Return the line about an outage that is over."""
    return (
        f"{place(past)} answers again after {duration(past.ended - past.since)} "
        f"(from {clock(past.since)} to {clock(past.ended)})"
    )


def clock(seconds: float) -> str:
    """Return Unix seconds as the local time of day."""
    return time.strftime("%H:%M:%S", time.localtime(seconds))
