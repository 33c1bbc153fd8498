"""The queue of changes between the HTTP thread, which requests them, and the loop of a service, which applies them."""

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any

from msgspec import structs

from palimpsest.common.control.changes import Caller, Change, ChangeState
from palimpsest.common.control.errors import HttpError

CHANGES_PER_S = 10
"""Maximum number of changes that are accepted within one second."""
MOST_REQUESTED = 100
"""Maximum number of changes that wait for the loop."""
MOST_KEPT = 1000
"""Number of changes whose state can be asked for. The log holds all that were applied."""
LONGEST_KEY = 200
"""Maximum length of an idempotency key, in characters."""


class ControlDesk:
    """The changes of one service. Any thread may call any method.

    prefix: start of the ids of changes. clock: seconds, for the rate limit.
    """

    def __init__(self, prefix: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._prefix, self._clock = prefix, clock
        self._lock = threading.Lock()
        self._changes: OrderedDict[str, Change] = OrderedDict()
        self._waiting: OrderedDict[str, None] = OrderedDict()
        """Ids of the changes that the loop has not taken."""
        self._keys: OrderedDict[str, tuple[tuple[str, str, str], str]] = OrderedDict()
        """Idempotency key -> the request that used it, and the id of its change."""
        self._accepted: deque[float] = deque(maxlen=CHANGES_PER_S)
        self._number = 0
        self._closed: tuple[str, str] | None = None

    def submit(
        self, kind: str, what: dict[str, Any], caller: Caller, *, applies_from: str, key: str | None = None
    ) -> Change:
        """Enter a change and return it. key: idempotency key; a repeated request returns its first change.

        Raises HttpError: 409 if the key belongs to another request or the service ends, 422 for a key that is too
        long, 429 if too many changes are requested.
        """
        if key is not None and not 0 < len(key) <= LONGEST_KEY:
            raise HttpError(422, "invalid_request", f"Idempotency-Key: use 1 to {LONGEST_KEY} characters")
        request = (kind, repr(sorted(what.items())), caller.name)
        with self._lock:
            if key is not None and (known := self._keys.get(key)):
                if known[0] != request:
                    raise HttpError(409, "key_conflict", "another request used this Idempotency-Key: choose a new one")
                return self._changes[known[1]]
            self._refuse_if_full()
            self._number += 1
            change = Change(
                id=f"{self._prefix}{self._number}",
                kind=kind,
                what=what,
                caller=caller,
                requested_at=time.time(),
                applies_from=applies_from,
            )
            for earlier in [self._changes[id_] for id_ in self._waiting]:
                if change.covers(earlier):
                    self._finish(earlier, ChangeState.SUPERSEDED, message=f"{change.id} sets the same keys")
            self._changes[change.id] = change
            self._waiting[change.id] = None
            if key is not None:
                self._keys[key] = (request, change.id)
            self._forget_oldest()
            return change

    @property
    def has_requests(self) -> bool:
        """Whether a change waits to be taken."""
        return bool(self._waiting)

    def take(self) -> list[Change]:
        """Return the changes that wait, oldest first. The caller must finish each of them."""
        with self._lock:
            taken = [self._changes[id_] for id_ in self._waiting]
            self._waiting.clear()
            return taken

    def finish(self, change: Change, state: ChangeState, **fields: Any) -> Change:
        """Set the final state of a change that was taken, and other fields of it. Return the change."""
        with self._lock:
            return self._finish(change, state, **fields)

    def get(self, id_: str) -> Change:
        """Return a change. Raises HttpError (404) if the id is unknown or the change is too old."""
        with self._lock:
            if (found := self._changes.get(id_)) is None:
                raise HttpError(404, "unknown_change", "there is no such change; GET /v1/changes lists the newest")
            return found

    def changes(self, limit: int) -> list[Change]:
        """Return the newest changes, oldest first."""
        with self._lock:
            return list(self._changes.values())[-limit:]

    def close(self, code: str, message: str) -> None:
        """End the queue: changes that are not finished are lost, and later requests are refused with 409 `code`."""
        with self._lock:
            if self._closed is None:
                self._closed = (code, message)
            self._waiting.clear()
            for change in list(self._changes.values()):
                if not change.is_finished:
                    self._finish(change, ChangeState.LOST, code=code, message=message)

    def _finish(self, change: Change, state: ChangeState, **fields: Any) -> Change:
        finished = structs.replace(change, state=state, **fields)
        self._changes[change.id] = finished
        self._waiting.pop(change.id, None)
        return finished

    def _refuse_if_full(self) -> None:
        if self._closed is not None:
            raise HttpError(409, *self._closed)
        now = self._clock()
        if len(self._accepted) == CHANGES_PER_S and now - self._accepted[0] < 1.0:
            raise HttpError(429, "too_many_changes", f"at most {CHANGES_PER_S} changes a second", retryable=True)
        if len(self._waiting) >= MOST_REQUESTED:
            raise HttpError(
                429, "too_many_changes", f"{MOST_REQUESTED} changes wait for the next version", retryable=True
            )
        self._accepted.append(now)

    def _forget_oldest(self) -> None:
        for id_ in list(self._changes)[: max(0, len(self._changes) - MOST_KEPT)]:
            if self._changes[id_].is_finished:
                del self._changes[id_]
        for key in [key for key, (_, id_) in self._keys.items() if id_ not in self._changes]:
            del self._keys[key]
