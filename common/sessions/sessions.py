"""The lifecycle of sessions: begin, step, finalize, expire, drain.

A reward is always a validated return value of an environment; after any failure it is null.
"""

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from palimpsest.common.config.schema import RunConfig
from palimpsest.common.control.errors import HttpError
from palimpsest.common.environments.port import EnvironmentFailed, Reply
from palimpsest.common.environments.tool_calls import turn
from palimpsest.common.sessions import instruments, replies, wire
from palimpsest.common.sessions.hosts import AtCapacity
from palimpsest.common.sessions.live_session import LiveSession
from palimpsest.common.sessions.registry import Entry, Registry
from palimpsest.common.sessions.session_store import SessionStore
from palimpsest.common.sessions.wire import CreateSession, Lease, SessionState, Status, Step, StepError, TakeStep

REMEMBERED_PER_SESSION = 8
"""Number of remembered ended sessions for each session that may be live."""
REMEMBERED_BYTES = 256 * 2**20
"""Maximum memory of all remembered ended sessions. The oldest are forgotten first."""


@dataclass(frozen=True, slots=True)
class SessionLimits:
    """The limits of sessions."""

    max_sessions: int
    lease_s: float
    remember_s: float
    result_bytes: int
    turns: int = 64
    calls: int = 512
    output_bytes: int = 16 * 2**20


def limits_of(config: RunConfig) -> SessionLimits:
    """Return the limits of a run's sessions."""
    gateway = config.env_gateway
    return SessionLimits(
        max_sessions=gateway.max_sessions,
        lease_s=config.session_lease_s,
        remember_s=gateway.remember_s,
        result_bytes=gateway.result_limit_bytes,
        turns=gateway.session_turns,
        calls=gateway.session_calls,
        output_bytes=gateway.session_output_bytes,
    )


class Sessions:
    """Begins, advances and ends sessions."""

    def __init__(
        self, registry: Registry, limits: SessionLimits, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._registry, self._limits, self._clock = registry, limits, clock
        self._ledger = SessionStore(
            remember=REMEMBERED_PER_SESSION * limits.max_sessions,
            remember_s=limits.remember_s,
            remember_bytes=REMEMBERED_BYTES,
        )
        self._draining = False

    async def create(self, wanted: CreateSession, key: str | None) -> bytes:
        """Begin a session, or return the one that this key began. Raises HttpError (404, 409, 410, 429, 502, 503)."""
        if earlier := self._ledger.of_key(key):
            return await self._replay_create(earlier, wanted)
        entry = self._registry.get(wanted.environment)
        if entry is None:
            raise HttpError(404, "unknown_environment", f"no environment {wanted.environment!r}; GET /v1/envs has all")
        if self._draining:
            raise _draining()
        if len(self._ledger) >= self._limits.max_sessions:
            raise HttpError(429, "capacity", f"{len(self._ledger)} sessions are live already", retryable=True)
        session = LiveSession(
            id=secrets.token_hex(16), wanted=wanted, key=key, lease_until=self._renewed(), on_end=self._has_ended
        )
        self._ledger.add(session)
        async with session.lock:
            try:
                return await self._begin(session, entry)
            finally:
                if session.opened is None:
                    if session.world is not None:
                        session.world.close()
                    self._ledger.discard(session)

    async def step(self, session_id: str, taken: TakeStep) -> bytes:
        """Take a step once, however often it is requested. Raises HttpError (404, 409, 410)."""
        session = self._find(session_id)
        action = taken.action.model_dump_json().encode()
        async with session.lock:
            self._expire_if_due(session)
            stored = session.stored(taken.step, action)
            if stored is not None:
                instruments.REPLAYS.labels("step").inc()
                return stored
            return session.replied(action, await self._step(session, taken))

    async def finalize(self, session_id: str) -> bytes:
        """End the session and score its current state; idempotent. Raises HttpError (404, 410)."""
        session = self._find(session_id)
        async with session.lock:
            self._expire_if_due(session)
            if session.ending is None:
                session.end(await self._score(session))
            assert session.ending is not None
            return session.ending.model_dump_json().encode()

    def heartbeat(self, session_id: str) -> Lease:
        """Renew the lease. Raises HttpError (404, 410)."""
        session = self._find(session_id)
        self._expire_if_idle(session)
        if session.ending is not None:
            raise session.gone()
        session.lease_until = self._renewed()
        return Lease(lease_expires_in_s=self._limits.lease_s)

    def has(self, session_id: str) -> bool:
        """Return whether the session is live or remembered."""
        return self._ledger.find(session_id) is not None

    def state(self, session_id: str) -> SessionState:
        """Return the state of a session. Raises HttpError (404)."""
        session = self._find(session_id)
        self._expire_if_idle(session)
        return session.state(self._clock())

    def close(self, session_id: str) -> None:
        """End the session at once if it runs, even during a step."""
        session = self._ledger.find(session_id)
        if session is not None and session.ending is None:
            session.end_without_reward(Status.CANCELLED)

    def sweep(self) -> None:
        """Expire sessions whose lease is over, and forget those that ended long ago."""
        for session in self._ledger.live:
            self._expire_if_idle(session)
        self._ledger.forget(self._clock())

    def refuse_new(self) -> None:
        """Refuse new sessions from now on. Safe in a signal handler."""
        self._draining = True

    @property
    def live(self) -> int:
        """Number of live sessions."""
        return len(self._ledger.live)

    @property
    def draining(self) -> bool:
        """Whether new sessions are refused."""
        return self._draining

    def drain(self) -> None:
        """Refuse new sessions and expire the live ones; their reward stays null."""
        self.refuse_new()
        for session in self._ledger.live:
            if session.opened is not None:
                session.end_without_reward(Status.EXPIRED)
            elif session.world is not None:
                session.world.close()

    def status(self) -> dict[str, Any]:
        """Return the session fields of /v1/status."""
        return {"draining": self._draining, **self._ledger.status()}

    async def _replay_create(self, session: LiveSession, wanted: CreateSession) -> bytes:
        """Answer a repeated creation; the first one may still be in progress."""
        if session.wanted != wanted:
            raise HttpError(409, "key_conflict", "this Idempotency-Key began another session")
        async with session.lock:
            pass
        if session.opened is not None:
            instruments.REPLAYS.labels("create").inc()
            return session.opened
        if session.ending is not None:
            raise session.gone()
        return await self.create(wanted, session.key)  # the first one failed to start

    async def _begin(self, session: LiveSession, entry: Entry) -> bytes:
        began = self._clock()
        try:
            session.world = await entry.open()
            opening, state_hash = await session.world.reset(session.wanted.seed)
        except AtCapacity as error:
            raise HttpError(429, "capacity", str(error), retryable=True) from None
        except EnvironmentFailed as failure:
            if self._draining:
                raise _draining() from None
            instruments.FAILURES.labels(entry.name, failure.code).inc()
            raise HttpError(502, failure.code, str(failure)) from None
        if self._draining:
            raise _draining()
        instruments.of(entry.name).reset_seconds.observe(self._clock() - began)
        self._ledger.mark_running(session)
        session.lease_until = self._renewed()
        reply = wire.Session(
            session_id=session.id,
            lease_expires_in_s=self._limits.lease_s,
            messages=opening.messages,
            tools=opening.tools,
            next_step=session.next_step,
            initial_state_hash=state_hash,
            environment_version=entry.version,
        )
        session.opened = reply.model_dump_json().encode()
        return session.opened

    async def _step(self, session: LiveSession, taken: TakeStep) -> Step:
        """Run the step in the environment; a failure also becomes a reply."""
        assert session.world is not None, "a live session has a world"
        counted, began, read = instruments.of(session.wanted.environment), self._clock(), turn(taken.action)
        session.calls += len(read.calls)
        if session.calls > self._limits.calls:
            return await self._limited(
                session, "calls", f"env_gateway.session_calls permits {self._limits.calls} calls"
            )
        try:
            outcome = await session.world.step(read)
            if isinstance(outcome, Reply):
                step = replies.continue_step(taken.step, read, outcome, limit_bytes=self._limits.result_bytes)
                counted.malformed.inc(len(read.attempts) - len(read.calls))
                counted.tool_errors.inc(outcome.tool_errors)
            else:
                step = replies.final_step(taken.step, Status.TERMINATED, outcome)
        except EnvironmentFailed as failure:
            step = replies.failed_step(taken.step, failure)
        if session.ending is not None:  # closed during the step
            raise session.gone()
        now = self._clock()
        counted.step_seconds.observe(now - began)
        counted.steps.inc()
        session.lease_until = now + self._limits.lease_s
        if step.status is Status.RUNNING and isinstance(outcome, Reply):
            session.output_bytes += sum(len(message.content.encode()) for message in outcome.messages)
            return await self._within_limits(session, step)
        return step

    async def _within_limits(self, session: LiveSession, step: Step) -> Step:
        """Return the step of a session that continues, or its end if it has reached a limit."""
        limits = self._limits
        if session.output_bytes > limits.output_bytes:
            permitted = f"env_gateway.session_output_bytes permits {limits.output_bytes} bytes from the environment"
            return await self._limited(session, "output_bytes", permitted)
        if session.next_step + 1 >= limits.turns:
            return await self._limited(session, "turns", f"env_gateway.session_turns permits {limits.turns} messages")
        return step

    async def _limited(self, session: LiveSession, limit: str, permitted: str) -> Step:
        """End the session at a limit with the score of its current state."""
        instruments.LIMITED.labels(session.wanted.environment, limit).inc()
        ending = await self._score(session)
        if ending.status is not Status.TRUNCATED:
            return ending
        return ending.model_copy(update={"error": StepError(code=f"limit_{limit}", message=permitted)})

    async def _score(self, session: LiveSession) -> Step:
        assert session.world is not None, "a live session has a world"
        try:
            score = await session.world.finalize()
            ending = replies.final_step(session.next_step, Status.TRUNCATED, score)
        except EnvironmentFailed as failure:
            ending = replies.failed_step(session.next_step, failure)
        if session.ending is not None:  # closed during the call
            raise session.gone()
        return ending

    def _find(self, session_id: str) -> LiveSession:
        session = self._ledger.find(session_id)
        if session is None:
            raise HttpError(404, "unknown_session", "no such session, or it ended long ago")
        return session

    def _has_ended(self, session: LiveSession) -> None:
        self._ledger.mark_ended(session, self._clock())

    def _renewed(self) -> float:
        return self._clock() + self._limits.lease_s

    def _expire_if_due(self, session: LiveSession) -> None:
        """Expire the session if its lease is over. Call it with the session's lock held."""
        if session.ending is None and session.lease_until <= self._clock():
            session.end_without_reward(Status.EXPIRED)

    def _expire_if_idle(self, session: LiveSession) -> None:
        """Expire the session if its lease is over and no step is running; a running step keeps it alive."""
        if not session.lock.locked():
            self._expire_if_due(session)


def _draining() -> HttpError:
    return HttpError(503, "draining", "the gateway is stopping and begins no new sessions", retryable=True)
