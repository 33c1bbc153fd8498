"""What this process depends on and cannot reach: which, since when, until when it is tried. One register a process.

The clients of the broker, the store and the gateway enter an outage when a call fails and leave it when a later try
succeeds or the call is given up. `/v1/status` publishes the register, `palimpsest_outage` counts it.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from prometheus_client import Gauge

from palimpsest.common.logs import logger
from palimpsest.common.metrics import REGISTRY

KAFKA, STORE, S3, GATEWAY = "Kafka", "snapshot_store", "S3", "env_gateway"
"""What may be away, as `of` names it."""
TOLD_S = 2.0
"""An outage shorter than this is not logged."""
OUTAGE = Gauge("palimpsest_outage", "1 while this process cannot reach it, 0 after that", ["of"], registry=REGISTRY)


@dataclass(slots=True)
class _OngoingOutage:
    since: float
    problem: str = ""
    waiting: "dict[int, float | None]" = field(default_factory=dict)
    """Call -> until when it tries, in Unix seconds; None: for as long as it takes."""
    told: bool = False


class Outages:
    """Any thread may use it. `clock` gives Unix seconds.

    >>> outages = Outages(clock=lambda: 100.0)
    >>> with outages.waiting() as call:
    ...     call.record_failure(STORE, "http://store:1", "ConnectError", until=220.0)
    ...     outages.ongoing()
    [{'of': 'snapshot_store', 'address': 'http://store:1', 'since': 100.0, 'until': 220.0, 'problem': 'ConnectError'}]
    >>> outages.ongoing()
    []
    """

    def __init__(self, *, clock: Callable[[], float] = time.time) -> None:
        self.logged = True
        """Whether an outage that lasts is written to the log; a program that shows outages otherwise does not."""
        self._clock = clock
        self._lock = threading.Lock()
        self._entries: dict[tuple[str, str], _OngoingOutage] = {}

    def waiting(self) -> "Waiting":
        """For one call, or for one client whose calls succeed or fail one after another."""
        return Waiting(self)

    def ongoing(self) -> list[dict[str, Any]]:
        """The outages that go on, for /v1/status; `until` is when the first call gives up, null if none will."""
        with self._lock:
            return [
                {
                    "of": of,
                    "address": address,
                    "since": entry.since,
                    "until": min((until for until in entry.waiting.values() if until is not None), default=None),
                    "problem": entry.problem,
                }
                for (of, address), entry in self._entries.items()
            ]

    def now(self) -> float:
        """Unix seconds."""
        return self._clock()

    def _enter(self, key: tuple[str, str], call: int, since: float, until: float | None, problem: str) -> None:
        now = self._clock()
        with self._lock:
            entry = self._entries.setdefault(key, _OngoingOutage(since))
            entry.since = min(entry.since, since)
            entry.problem = problem
            entry.waiting[call] = until
            OUTAGE.labels(key[0]).set(1)
            tell = self.logged and not entry.told and now - entry.since >= TOLD_S
            entry.told |= tell
        if tell:
            logger().warning("no answer", of=key[0], address=key[1], problem=problem)

    def _leave(self, key: tuple[str, str], call: int) -> None:
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:  # the register was emptied meanwhile
                return
            entry.waiting.pop(call, None)
            if entry.waiting:
                return
            del self._entries[key]
            OUTAGE.labels(key[0]).set(float(any(of == key[0] for of, _ in self._entries)))
        if entry.told:
            seconds = round(self._clock() - entry.since, 1)
            logger().info("waits no longer", of=key[0], address=key[1], seconds=seconds)


class Waiting:
    """A call's part in the register. Leaving the block leaves the outage, whatever became of the call."""

    def __init__(self, outages: Outages) -> None:
        self._outages, self._began = outages, outages.now()
        self._key: tuple[str, str] | None = None
        self._lock = threading.Lock()

    def record_failure(
        self, of: str, address: str, problem: str, *, until: float | None = None, since: float | None = None
    ) -> None:
        """There was no answer; it is tried again until `until`. `since`: by default when the call began."""
        with self._lock:
            if self._key not in (None, (of, address)):
                self._leave()
            self._key = (of, address)
            self._outages._enter(self._key, id(self), self._began if since is None else since, until, problem)

    def record_answer(self) -> None:
        """There was an answer. A failure after it begins another outage."""
        with self._lock:
            self._leave()
            self._began = self._outages.now()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.record_answer()

    def _leave(self) -> None:
        if self._key is not None:
            self._outages._leave(self._key, id(self))
            self._key = None


OUTAGES = Outages()
"""This process's."""
