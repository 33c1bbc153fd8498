"""The state of one session: its next step, the replies to earlier steps, and its end.

Invariant: steps 0 to next_step - 1 have replies. A running session keeps the last ones up to REPLY_BYTES, an ended one
the last. The status leaves `running` once.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from palimpsest.common.control.errors import HttpError
from palimpsest.common.sessions.hosts import EnvironmentHost
from palimpsest.common.sessions.wire import CreateSession, SessionState, Status, Step

REPLY_BYTES = 2**20
"""Maximum size of a running session's replies to earlier steps. The reply to the last step is always kept."""
SESSION_BYTES = 2**11
"""Memory of a session besides its replies."""


@dataclass(slots=True)
class LiveSession:
    """A live session, or the remembered state of an ended one."""

    id: str
    wanted: CreateSession
    key: str | None
    """The Idempotency-Key of its creation."""
    lease_until: float
    on_end: Callable[["LiveSession"], None]
    """Called once, when the session ends."""
    world: EnvironmentHost | None = None
    """The host of the environment; None before it opens and after the end."""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    opened: bytes | None = None
    """The reply to its creation; None before that and after the end."""
    next_step: int = 0
    calls: int = 0
    """Tool calls of the model so far, those of a step that was refused included."""
    output_bytes: int = 0
    """Text that the environment returned so far, before it is truncated, as UTF-8."""
    status: Status = Status.RUNNING
    ending: Step | None = None
    """The last step. Its number is that of the step that ended the session, else the next step's."""
    _replies: dict[int, tuple[bytes, bytes]] = field(default_factory=dict)
    _reply_bytes: int = 0

    def stored(self, number: int, action: bytes) -> bytes | None:
        """Return the reply to an earlier step; None if this is the next step. Raises HttpError (409, 410).

        Number and action identify a step: a repeated step gets the same reply, another action is a conflict.
        """
        if number < self.next_step:
            if number not in self._replies:
                raise (
                    self.gone()
                    if self.ending
                    else HttpError(
                        410, "gone", f"the reply to step {number} is not kept any more", next_step=self.next_step
                    )
                )
            known, reply = self._replies[number]
            if known != action:
                raise HttpError(
                    409, "step_conflict", f"step {number} was taken with another action", next_step=self.next_step
                )
            return reply
        if self.status.is_terminal:
            raise self.gone()
        if number > self.next_step:
            raise HttpError(409, "step_gap", f"step {number} skips step {self.next_step}", next_step=self.next_step)
        return None

    def replied(self, action: bytes, step: Step) -> bytes:
        """Store the reply to the next step, and end the session if it is the last. Return the reply's bytes."""
        reply = step.model_dump_json().encode()
        self._replies[self.next_step] = action, reply
        self._reply_bytes += len(action) + len(reply)
        while self._reply_bytes > REPLY_BYTES and len(self._replies) > 1:
            self._forget(next(iter(self._replies)))
        self.next_step += 1
        if step.status.is_terminal:
            self.end(step)
        return reply

    def end(self, ending: Step) -> None:
        """End the session: close the environment, keep the last reply and the ending."""
        assert self.ending is None, "a session ends once"
        self.status, self.ending, self.opened = ending.status, ending, None
        for number in [number for number in self._replies if number != self.next_step - 1]:
            self._forget(number)
        if self.world is not None:
            self.world.close()
            self.world = None
        self.on_end(self)

    @property
    def bytes(self) -> int:
        """Memory that the replies of the session take."""
        return SESSION_BYTES + self._reply_bytes + len(self.opened or b"")

    def _forget(self, number: int) -> None:
        self._reply_bytes -= sum(map(len, self._replies.pop(number)))

    def end_without_reward(self, status: Status) -> None:
        """End the session as expired or cancelled."""
        self.end(Step(step=self.next_step, status=status))

    def gone(self) -> HttpError:
        """Return the error for a step that can be neither taken nor replayed."""
        return HttpError(410, "gone", f"the session is over: {self.status}")

    def state(self, now: float) -> SessionState:
        """Return the state for GET /v1/sessions/{id}."""
        ending = self.ending
        return SessionState(
            session_id=self.id,
            environment=self.wanted.environment,
            status=self.status,
            next_step=self.next_step,
            lease_expires_in_s=None if ending else max(0.0, self.lease_until - now),
            reward=ending.reward if ending else None,
            reward_parts=ending.reward_parts if ending else {},
            success=ending.success if ending else None,
            error=ending.error if ending else None,
        )
