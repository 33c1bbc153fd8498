"""Register of the services that this process cannot reach, with the start and the deadline of each outage.

The clients of the broker, the store and the gateway enter an outage when a call fails. They leave it when a retry
succeeds or the call ends without success. `/v1/status` shows the register; the gauge `palimpsest_outage` reports it.
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
"""Values of `of`: the services that may be unreachable."""
ROOM = "room in the snapshot store"
"""Value of `of` while the store is at its limit of bytes."""
LOG_AFTER_S = 2.0
"""An outage shorter than this is not logged."""
OUTAGE = Gauge(
    "palimpsest_outage", "1 while this process cannot reach the service `of`, 0 after that", ["of"], registry=REGISTRY
)


@dataclass(slots=True)
class _OngoingOutage:
    since: float
    problem: str = ""
    waiting: "dict[int, float | None]" = field(default_factory=dict)
    """Call -> end of its retries in Unix seconds; None if it retries without a limit."""
    logged: bool = False


class Outages:
    """Register of outages. Thread-safe. `clock` returns Unix seconds.

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
        """Whether outages longer than LOG_AFTER_S are logged. False in programs that show outages in another way."""
        self._clock = clock
        self._lock = threading.Lock()
        self._entries: dict[tuple[str, str], _OngoingOutage] = {}

    def waiting(self) -> "Waiting":
        """Return an entry for one call, or for one client that makes one call at a time."""
        return Waiting(self)

    def ongoing(self) -> list[dict[str, Any]]:
        """Return the current outages for /v1/status.

        `until` is the earliest end of the retries of a call, or None if all calls retry without a limit.
        """
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
        """Return the time in Unix seconds."""
        return self._clock()

    def _enter(self, key: tuple[str, str], call: int, since: float, until: float | None, problem: str) -> None:
        now = self._clock()
        with self._lock:
            entry = self._entries.setdefault(key, _OngoingOutage(since))
            entry.since = min(entry.since, since)
            entry.problem = problem
            entry.waiting[call] = until
            OUTAGE.labels(key[0]).set(1)
            log = self.logged and not entry.logged and now - entry.since >= LOG_AFTER_S
            entry.logged |= log
        if log:
            logger().warning("no answer", of=key[0], address=key[1], problem=problem)

    def _leave(self, key: tuple[str, str], call: int) -> None:
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:  # another call emptied the register
                return
            entry.waiting.pop(call, None)
            if entry.waiting:
                return
            del self._entries[key]
            OUTAGE.labels(key[0]).set(float(any(of == key[0] for of, _ in self._entries)))
        if entry.logged:
            seconds = round(self._clock() - entry.since, 1)
            logger().info("reply received", of=key[0], address=key[1], seconds=seconds)


class Waiting:
    """Entry of one call in the register. Exit of the block removes it, after success and failure alike."""

    def __init__(self, outages: Outages) -> None:
        self._outages, self._began = outages, outages.now()
        self._key: tuple[str, str] | None = None
        self._lock = threading.Lock()

    def record_failure(
        self, of: str, address: str, problem: str, *, until: float | None = None, since: float | None = None
    ) -> None:
        """Record that the service did not answer.

        `until`: end of the retries in Unix seconds. `since`: start of the outage, by default the start of the call.
        """
        with self._lock:
            if self._key not in (None, (of, address)):
                self._leave()
            self._key = (of, address)
            self._outages._enter(self._key, id(self), self._began if since is None else since, until, problem)

    def record_answer(self) -> None:
        """Record an answer. A later failure starts a new outage."""
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
"""The register of this process."""
