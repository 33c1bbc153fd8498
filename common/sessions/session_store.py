"""Stores live and recently ended sessions, and counts all sessions by status.

Invariant: every session that began is either live or counted under exactly one status. An ended session is remembered
for a while with its Idempotency-Key, so that a late retry gets the stored reply and begins no second session.
"""

from collections import Counter, OrderedDict
from typing import Any

from palimpsest.common.sessions import instruments
from palimpsest.common.sessions.live_session import LiveSession
from palimpsest.common.sessions.wire import Status


class SessionStore:
    """Sessions by id and by key."""

    def __init__(self, *, remember: int, remember_s: float, remember_bytes: int) -> None:
        """Remember ended sessions for `remember_s` seconds, at most `remember` of them and `remember_bytes`."""
        self._remember, self._remember_s, self._remember_bytes = remember, remember_s, remember_bytes
        self._ended_bytes = 0
        self._live: dict[str, LiveSession] = {}
        self._ended: OrderedDict[str, tuple[float, LiveSession]] = OrderedDict()
        self._keys: dict[str, LiveSession] = {}
        self._totals: Counter[tuple[str, Status]] = Counter()

    @property
    def live(self) -> tuple[LiveSession, ...]:
        """The sessions that run or are starting."""
        return tuple(self._live.values())

    def __len__(self) -> int:
        return len(self._live)

    def find(self, session_id: str) -> LiveSession | None:
        """Return the live or remembered session, or None."""
        if session := self._live.get(session_id):
            return session
        _, session = self._ended.get(session_id, (0.0, None))
        return session

    def of_key(self, key: str | None) -> LiveSession | None:
        """Return the session that this Idempotency-Key began; None for no key."""
        return None if key is None else self._keys.get(key)

    def add(self, session: LiveSession) -> None:
        """Add a session that is starting."""
        self._live[session.id] = session
        if session.key is not None:
            self._keys[session.key] = session

    def mark_running(self, session: LiveSession) -> None:
        """Count a session that runs now."""
        counted = instruments.of(session.wanted.environment)
        counted.created.inc()
        counted.live.inc()

    def discard(self, session: LiveSession) -> None:
        """Remove a session that failed to start; its key is free again."""
        del self._live[session.id]
        if session.key is not None:
            del self._keys[session.key]

    def mark_ended(self, session: LiveSession, now: float) -> None:
        """Count and remember an ended session."""
        assert session.ending is not None
        environment, status, error = session.wanted.environment, session.status, session.ending.error
        del self._live[session.id]
        self._ended[session.id] = now + self._remember_s, session
        self._totals[environment, status] += 1
        instruments.ENDED.labels(environment, status.value).inc()
        instruments.of(environment).live.dec()
        if session.ending.reward is not None:
            instruments.of(environment).reward.observe(session.ending.reward)
        if error is not None and status is Status.ERROR:
            instruments.FAILURES.labels(environment, error.code).inc()
        self._ended_bytes += session.bytes
        while len(self._ended) > self._remember or self._ended_bytes > self._remember_bytes:
            self._forget_oldest()

    def forget(self, now: float) -> None:
        """Remove ended sessions whose time is over."""
        while self._ended and next(iter(self._ended.values()))[0] <= now:
            self._forget_oldest()

    def status(self) -> dict[str, Any]:
        """Return the number of live and remembered sessions, and totals by status and by environment."""
        by_environment: dict[str, Counter[str]] = {}
        for session in self._live.values():
            by_environment.setdefault(session.wanted.environment, Counter())[Status.RUNNING.value] += 1
        for (environment, status), count in self._totals.items():
            by_environment.setdefault(environment, Counter())[status.value] += count
        totals: Counter[str] = sum(by_environment.values(), Counter())
        return {
            "live_sessions": len(self._live),
            "remembered_sessions": len(self._ended),
            "remembered_bytes": self._ended_bytes,
            "sessions": dict(totals),
            "environments": {name: dict(counts) for name, counts in by_environment.items()},
        }

    def _forget_oldest(self) -> None:
        _, (_, session) = self._ended.popitem(last=False)
        self._ended_bytes -= session.bytes
        if session.key is not None:
            del self._keys[session.key]
