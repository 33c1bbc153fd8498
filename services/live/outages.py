"""The outages of a run: what its services say of them, merged, and in a person's words. Pure."""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from palimpsest.common.outages import GATEWAY, KAFKA, S3, STORE
from palimpsest.common.text import duration, listed

SHOWN_S = 3.0
"""A shorter outage is not worth a word."""
GAP_S = 3.0
"""An outage is over when nobody has told of it for so long: the services are asked one after another."""
NAMES = {KAFKA: "Kafka", STORE: "snapshot store", S3: "S3", GATEWAY: "environment gateway"}
MENDS = {
    KAFKA: "Start the broker: the run then goes on by itself",
    STORE: "See logs/snapshot_store.log. If its process hangs, kill -9 it: it is started again by itself",
    S3: "Start it: the run then goes on by itself",
    GATEWAY: "See logs/env_gateway.log. If its process hangs, kill -9 it: it is started again by itself",
}
NEEDS = {
    KAFKA: "every service reads and writes there",
    STORE: "learner and workers need it for every version",
    S3: "the store needs it for every version",
    GATEWAY: "the workers need it for every message",
}
"""Who will wait, where nobody has said so: a call that hangs says nothing for a while."""
LIMITS = {
    KAFKA: "(bus.outage_limit_s); then the run ends with code 3 and can go on later with --resume",
    STORE: "; then they are started again from the last checkpoint",
    S3: "; then they are started again from the last checkpoint",
    GATEWAY: "; then what waits is tried in a new session, and dropped when its attempts are used up",
}


@dataclass(frozen=True, slots=True)
class Outage:
    """Something that the run needs and that does not answer."""

    of: str
    """As common/outages.py names it."""
    address: str
    since: float
    """Unix seconds, like `until`."""
    until: float | None = None
    """When the first of those who wait gives up; None: nobody does."""
    problem: str = ""
    waiting: tuple[str, ...] = ()
    """Services that wait for it."""


@dataclass(frozen=True, slots=True)
class EndedOutage:
    """An outage that is over."""

    of: str
    address: str
    since: float
    ended: float
    """Unix seconds, like `since`."""


def merge(told: Mapping[str, Iterable[Mapping[str, Any]]], own: Iterable[Outage] = ()) -> tuple[Outage, ...]:
    """What the services tell (service -> the `outages` of its status) and what was seen from outside, as one list.

    The earliest beginning and the earliest end of trying count. The longest outage comes first.
    """
    found: dict[tuple[str, str], Outage] = {}
    said = [
        Outage(each["of"], each["address"], each["since"], each.get("until"), each.get("problem", ""), (service,))
        for service, outages in told.items()
        for each in outages
    ]
    for outage in [*said, *own]:
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
    """Outages over a run's time: what goes on, and what is over.

    >>> course = OutageHistory()
    >>> course.update(10.0, [Outage("Kafka", "k:1", 5.0)])
    >>> course.update(20.0, [])
    >>> course.current, course.past
    ((), (EndedOutage(of='Kafka', address='k:1', since=5.0, ended=10.0),))
    """

    def __init__(self) -> None:
        self.current: tuple[Outage, ...] = ()
        """Those that are long enough to be shown."""
        self.past: tuple[EndedOutage, ...] = ()
        """Those that were shown, oldest first."""
        self._seen: dict[tuple[str, str], tuple[Outage, float]] = {}
        """Outage and when it was last told of."""

    def update(self, now: float, outages: Sequence[Outage]) -> None:
        """Take in what is told at `now`, in Unix seconds."""
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
    """What and where.

    >>> place(Outage("S3", "http://s3:9000", 0.0))
    'S3 at http://s3:9000'
    """
    return f"{NAMES.get(outage.of, outage.of)} at {outage.address}"


def short_text(outage: Outage, now: float) -> str:
    """Which, and since when."""
    return f"no answer from {place(outage)} since {clock(outage.since)} ({duration(now - outage.since)})"


def who_waits(outage: Outage) -> str:
    """Who waits for it, and until when."""
    if not outage.waiting:
        return NEEDS.get(outage.of, "nobody has waited for it so far")
    who = f"{listed(outage.waiting)} {'waits' if len(outage.waiting) == 1 else 'wait'} for it"
    if outage.until is None:
        return f"{who}, as long as it takes"
    limit = LIMITS.get(outage.of, "")
    return f"{who} until {clock(outage.until)}{'' if limit.startswith(';') else ' '}{limit}"


def remedy(outage: Outage) -> str:
    """What to do."""
    return MENDS.get(outage.of, "Start it")


def full_text(outage: Outage, now: float) -> str:
    """All of that, and what the last try said."""
    problem = f" ({outage.problem})" if outage.problem else ""
    return f"{short_text(outage, now)}{problem}; {who_waits(outage)}. {remedy(outage)}"


def ended_text(past: EndedOutage) -> str:
    """That it is over."""
    return (
        f"{place(past)} answers again: it was away for {duration(past.ended - past.since)}, "
        f"from {clock(past.since)} to {clock(past.ended)}"
    )


def clock(seconds: float) -> str:
    """Unix seconds as the time of day here."""
    return time.strftime("%H:%M:%S", time.localtime(seconds))
