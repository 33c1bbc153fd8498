"""Polls the status of a run's services in threads, so that an observer never waits for them."""

import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from palimpsest.common import run_folder
from palimpsest.common.bus.decoding import dead_letter, message_in
from palimpsest.common.bus.port import Bus, Consumer, Outgoing
from palimpsest.common.logs import logger
from palimpsest.common.messages import DEAD_LETTERS, WORKERS, VersionApplied, encode
from palimpsest.common.outages import GATEWAY, OUTAGES, STORE
from palimpsest.common.rejected_record import RejectedRecord
from palimpsest.common.snapshots.retrying_http import StoreUnavailable
from palimpsest.common.user_error import UserError
from palimpsest.services.live.history_tail import HistoryTail, TrainedVersions
from palimpsest.services.live.outages import EndedOutage, Outage, OutageHistory, merge

EVERY_S = 1.0
TIMEOUT_S = 2.0
SILENT_S = 8.0
"""A store or gateway that stops answering for this time counts as an outage, even if no service waits for it."""
STALE_S = 10.0
"""The outages that a service reported expire this many seconds after its last reply."""
WINDOW = 15
"""Number of replies kept of each service, for rates."""

Status = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class StatusReply:
    """A service's /v1/status, and when it was received, by time.monotonic()."""

    at: float
    status: Status


@dataclass(frozen=True, slots=True)
class ServiceObservation:
    """The observed state of a service. The last reply is kept if later requests fail."""

    last: StatusReply | None = None
    earlier: StatusReply | None = None
    """A reply of the same process some seconds before the last, for rates."""
    trouble: str | None = None
    """Why the newest request failed; None if it did not."""


@dataclass(frozen=True, slots=True)
class RunObservation:
    """The observed state of a run at one moment."""

    services: Mapping[str, ServiceObservation]
    trained: TrainedVersions = field(default_factory=TrainedVersions)
    """The versions in history.jsonl."""
    applied: tuple[VersionApplied, ...] = ()
    """Each worker's newest update, and every update that was refused, in the order of the log."""
    outages: tuple[Outage, ...] = ()
    past: tuple[EndedOutage, ...] = ()
    """Outages that are over, oldest first."""
    clock: float = 0.0
    """Unix seconds at time.monotonic() = 0; outages have times in Unix seconds."""


class RunPoller:
    """Polls services, history and log in threads; `with RunPoller(...)` starts and stops them."""

    def __init__(self, urls: Mapping[str, str], home: Path, bus: Bus, *, run: str, token: str | None = None) -> None:
        self._urls, self._bus, self._run = dict(urls), bus, run
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._seen = {name: ServiceObservation() for name in urls}
        self._tail = HistoryTail(home / run_folder.HISTORY)
        self._newest: dict[str, VersionApplied] = {}
        self._refused: list[VersionApplied] = []
        self._outage_history = OutageHistory()
        OUTAGES.logged = False  # this process logs to the terminal, where the view shows outages
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._threads = [
            *(threading.Thread(target=self._ask, args=(name,), name=f"ask {name}", daemon=True) for name in urls),
            threading.Thread(target=self._read, name="read", daemon=True),
        ]

    def observe(self) -> RunObservation:
        """Return the observed state at this moment."""
        now, wall = time.monotonic(), time.time()
        with self._lock:
            seen, trained = dict(self._seen), self._tail.read(now)
            self._outage_history.update(wall, self._outages(seen, now, wall))
            applied = (*self._refused, *(update for update in self._newest.values() if update.accepted))
            return RunObservation(
                seen, trained, applied, self._outage_history.current, self._outage_history.past, wall - now
            )

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        for thread in self._threads:
            thread.join(EVERY_S + TIMEOUT_S)

    def _ask(self, name: str) -> None:
        answers: deque[StatusReply] = deque(maxlen=WINDOW)
        with httpx.Client(timeout=TIMEOUT_S, trust_env=False, headers=self._headers) as http:
            while not self._closed.is_set():
                seen = self._seen[name]
                try:
                    status = http.get(f"{self._urls[name]}/v1/status").raise_for_status().json()
                except (httpx.HTTPError, ValueError) as error:
                    seen = replace(seen, trouble=type(error).__name__)
                    if isinstance(error, httpx.ConnectError):
                        answers.clear()  # the process is gone; the next one counts from 0
                else:
                    answers.append(StatusReply(time.monotonic(), status))
                    seen = ServiceObservation(answers[-1], answers[0] if len(answers) > 1 else None)
                with self._lock:
                    self._seen[name] = seen
                self._closed.wait(EVERY_S)

    def _outages(self, seen: Mapping[str, ServiceObservation], now: float, wall: float) -> tuple[Outage, ...]:
        """Return the outages that services or this process report, and the servers that do not answer the poller."""
        reported = {
            name: one.last.status.get("outages", ())
            for name, one in seen.items()
            if one.last is not None and (one.trouble is None or now - one.last.at < STALE_S)
        }
        own = [replace(each, waiting=()) for each in merge({"": OUTAGES.ongoing()})]
        own += [
            Outage(name, self._urls[name], one.last.at + wall - now, problem=one.trouble)
            for name, one in seen.items()
            if name in (STORE, GATEWAY) and one.last and one.trouble and now - one.last.at > SILENT_S
        ]
        starting = {name for name, one in seen.items() if one.last is None}
        return tuple(outage for outage in merge(reported, own) if outage.of not in starting)

    def _read(self) -> None:
        """Read the log in a loop; errors restart the reading, because a failure of the view must not end the run."""
        while not self._closed.is_set():
            self._newest, self._refused = {}, []
            try:
                self._follow()
            except (UserError, StoreUnavailable, LookupError) as error:
                logger().debug("view reads the log again", problem=str(error))
                self._closed.wait(EVERY_S)

    def _follow(self) -> None:
        with self._bus.consumer(WORKERS) as consumer:
            self._poll_workers(consumer)
            while not self._closed.wait(EVERY_S):
                self._poll_workers(consumer)
            self._poll_workers(consumer)  # records that arrived during the last wait

    def _poll_workers(self, consumer: Consumer) -> None:
        for record in consumer.poll(limit=1024, timeout_s=0.0):
            try:
                message = message_in(record)
            except RejectedRecord as error:
                letter = encode(dead_letter(self._run, record, error, now=time.time()))
                self._bus.publish(DEAD_LETTERS, [Outgoing(record.key, letter)])
                continue
            if isinstance(message, VersionApplied):
                with self._lock:
                    self._newest[message.worker] = message
                    self._refused += [] if message.accepted else [message]
