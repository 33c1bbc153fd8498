"""What the services of a run say of themselves, asked from threads: whoever looks never waits for them."""

import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import msgspec

from common.bus.port import Bus, Consumer, Outgoing
from common.messages import DEAD_LETTERS, WORKERS, VersionApplied, dead_letter, encode, message_in
from common.unusable import Unusable
from services.report.folder import HISTORY, Line

EVERY_S = 1.0
TIMEOUT_S = 2.0
WINDOW = 15
"""Answers remembered of each service, for rates."""

Status = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Answer:
    """A service's /v1/status and when it came, by time.monotonic()."""

    at: float
    status: Status


@dataclass(frozen=True, slots=True)
class Seen:
    """What is known of a service. The last answer stays when later requests fail."""

    last: Answer | None = None
    earlier: Answer | None = None
    """One from some seconds before the last, of the same process: for rates."""
    trouble: str | None = None
    """Why the newest request had no answer; None when it had."""


@dataclass(frozen=True, slots=True)
class Sight:
    """Everything that is known, at one moment."""

    services: Mapping[str, Seen]
    lines: tuple[Line, ...] = ()
    """Of history.jsonl."""
    applied: tuple[VersionApplied, ...] = ()
    """Updates of all workers since the run began."""


class Watch:
    """Threads that ask; `with Watch(...)` starts and ends them."""

    def __init__(self, urls: Mapping[str, str], home: Path, bus: Bus, *, run: str, token: str | None = None) -> None:
        self._urls, self._bus, self._run = dict(urls), bus, run
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._seen = {name: Seen() for name in urls}
        self._tail = Tail(home / HISTORY)
        self._applied: list[VersionApplied] = []
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._threads = [
            *(threading.Thread(target=self._ask, args=(name,), name=f"ask {name}", daemon=True) for name in urls),
            threading.Thread(target=self._read, name="read", daemon=True),
        ]

    def sight(self) -> Sight:
        """What is known now."""
        with self._lock:
            self._tail.read()
            return Sight(dict(self._seen), tuple(self._tail.lines), tuple(self._applied))

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
        answers: deque[Answer] = deque(maxlen=WINDOW)
        with httpx.Client(timeout=TIMEOUT_S, trust_env=False, headers=self._headers) as http:
            while not self._closed.is_set():
                seen = self._seen[name]
                try:
                    status = http.get(f"{self._urls[name]}/v1/status").raise_for_status().json()
                except (httpx.HTTPError, ValueError) as error:
                    seen = replace(seen, trouble=type(error).__name__)
                    if isinstance(error, httpx.ConnectError):
                        answers.clear()  # the process is gone: its successor counts anew
                else:
                    answers.append(Answer(time.monotonic(), status))
                    seen = Seen(answers[-1], answers[0] if len(answers) > 1 else None)
                with self._lock:
                    self._seen[name] = seen
                self._closed.wait(EVERY_S)

    def _read(self) -> None:
        with self._bus.consumer(WORKERS) as consumer:
            self._hear(consumer)
            while not self._closed.wait(EVERY_S):
                self._hear(consumer)
            self._hear(consumer)  # what came last

    def _hear(self, consumer: Consumer) -> None:
        heard = []
        for record in consumer.poll(limit=1024, timeout_s=0.0):
            try:
                message = message_in(record)
            except Unusable as error:
                letter = encode(dead_letter(self._run, record, error, now=time.time()))
                self._bus.publish(DEAD_LETTERS, [Outgoing(record.key, letter)])
                continue
            if isinstance(message, VersionApplied):
                heard.append(message)
        with self._lock:
            self._applied += heard


class Tail:
    """Follows a history file that grows, and that a restart of the learner cuts back."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._last = b""
        self._last_at = 0
        self.lines: list[Line] = []
        """So far."""

    def read(self) -> None:
        """Take in whole lines that were added; after a cut, begin anew."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._last_at)
                body = file.read()
                if not body.startswith(self._last):
                    self._last, self._last_at = b"", 0
                    self.lines.clear()
                    file.seek(0)
                    body = file.read()
        except FileNotFoundError:
            return
        *whole, _ = body[len(self._last) :].split(b"\n")
        at = self._last_at + len(self._last)
        for line in whole:
            self.lines.append(msgspec.json.decode(line))
            self._last, self._last_at = line + b"\n", at
            at += len(self._last)
