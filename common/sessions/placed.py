"""Where the sessions of each environment run: in the worker's process, or at the gateway."""

from contextlib import AsyncExitStack
from types import TracebackType
from typing import Self

from palimpsest.common.config.schema import RunConfig
from palimpsest.common.config.session_environments import session_environments
from palimpsest.common.sessions.client import SessionClient
from palimpsest.common.sessions.in_process import InProcessSessions
from palimpsest.common.sessions.port import PATIENCE_S, EnvironmentSessions
from palimpsest.common.sessions.registry import built_in
from palimpsest.common.sessions.wire import CreateSession, Lease, Session, Step


def in_process(config: RunConfig) -> frozenset[str]:
    """Return the environments of the run that a worker steps in its own process."""
    if config.environments_place != "in_process":
        return frozenset()
    return session_environments(config) & frozenset(built_in())


def needs_gateway(config: RunConfig) -> bool:
    """Return whether any environment of the run is stepped by the gateway."""
    return bool(session_environments(config) - in_process(config))


class PlacedSessions:
    """The port (port.py) over both places. A session stays where it was created."""

    def __init__(self, local: InProcessSessions, gateway: SessionClient, *, in_process: frozenset[str]) -> None:
        """in_process: names of the environments that `local` serves; the gateway serves all others."""
        self._local, self._gateway, self._in_process = local, gateway, in_process
        self._opened = AsyncExitStack()

    async def __aenter__(self) -> Self:
        await self._opened.enter_async_context(self._gateway)
        await self._opened.enter_async_context(self._local)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._opened.aclose()

    async def create(self, request: CreateSession, *, idempotency_key: str, capacity_s: float = PATIENCE_S) -> Session:
        """See EnvironmentSessions."""
        place: EnvironmentSessions = self._local if request.environment in self._in_process else self._gateway
        return await place.create(request, idempotency_key=idempotency_key, capacity_s=capacity_s)

    async def step(self, session_id: str, number: int, text: str) -> Step:
        """See EnvironmentSessions."""
        return await self._place(session_id).step(session_id, number, text)

    async def heartbeat(self, session_id: str) -> Lease:
        """See EnvironmentSessions."""
        return await self._place(session_id).heartbeat(session_id)

    async def finalize(self, session_id: str) -> Step:
        """See EnvironmentSessions."""
        return await self._place(session_id).finalize(session_id)

    async def close(self, session_id: str) -> None:
        """See EnvironmentSessions."""
        await self._place(session_id).close(session_id)

    def _place(self, session_id: str) -> EnvironmentSessions:
        """Return where the session is. The gateway answers for a session that this process has forgotten."""
        return self._local if self._local.has(session_id) else self._gateway
