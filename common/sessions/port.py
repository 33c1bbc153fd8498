"""What a rollout worker calls to play a session, with three adapters.

client.py asks a gateway, in_process.py steps built-in environments in this process, placed.py chooses between the two
by the environment. tests/contract/test_sessions.py runs on all of them.
"""

from typing import Protocol

from palimpsest.common.sessions.wire import CreateSession, Lease, Session, Step

PATIENCE_S = 120.0
"""Maximum outage of the gateway that a call survives, in seconds. (A restarted gateway has lost its sessions.)"""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 3.2
"""Pause before the second attempt, in seconds; it doubles for each further attempt, up to the second value."""
CAPACITY, DRAINING, UNREACHABLE = "capacity", "draining", "unreachable"
"""Codes of errors that say nothing about the environment: every place is taken, the gateway stops, or none answers."""


class SessionFailed(Exception):
    """Raised if the gateway or the environment could not serve the request. The reward stays unknown."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code


class EnvironmentSessions(Protocol):
    """Sessions with environments. Every call raises SessionFailed. A repeated call has no further effect."""

    async def create(self, request: CreateSession, *, idempotency_key: str, capacity_s: float = PATIENCE_S) -> Session:
        """Create a session. A repeated call with the same key returns the same session.

        capacity_s: time for a place to become free, in seconds.
        """

    async def step(self, session_id: str, number: int, text: str) -> Step:
        """Send the model message of step `number`."""

    async def heartbeat(self, session_id: str) -> Lease:
        """Renew the lease of a session."""

    async def finalize(self, session_id: str) -> Step:
        """End the session and score the steps so far."""

    async def close(self, session_id: str) -> None:
        """Delete the session."""
