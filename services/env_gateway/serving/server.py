"""The application of a served environment."""

from collections.abc import Awaitable, Callable
from typing import Literal, Protocol

from fastapi import FastAPI

from palimpsest.common.control.access import Access
from palimpsest.common.metrics import REGISTRY
from palimpsest.common.service import application
from palimpsest.common.sessions.registry import Registry
from palimpsest.common.sessions.sessions import Sessions
from palimpsest.services.env_gateway.serving.mcp_shape import McpShape
from palimpsest.services.env_gateway.serving.openenv_shape import OpenEnvShape
from palimpsest.services.env_gateway.serving.ors_shape import OrsShape
from palimpsest.services.env_gateway.serving.served_session import ServedSession, Tool
from palimpsest.services.env_gateway.session_lifespan import session_lifespan

MAX_BYTES = 2**20
"""Maximum size of a request or a message."""
Kind = Literal["openenv", "mcp", "ors"]


class Shape(Protocol):
    """The routes of a protocol."""

    def add_routes(self, app: FastAPI) -> None:
        """Add the routes of the protocol."""

    def sweep(self) -> None:
        """Forget what has ended."""


async def first_tools(sessions: Sessions, environment: str) -> list[Tool]:
    """Begin and end the task 0, and return its tools. Raises ServedSessionFailed."""
    session = await ServedSession.begin(sessions, environment, 0)
    session.close()
    return session.tools


def shape(
    kind: Kind,
    sessions: Sessions,
    registry: Registry,
    environment: str,
    *,
    tools: list[Tool],
    tasks: int,
    access: Access,
) -> Shape:
    """Return the routes of a protocol for one environment. tasks: number of tasks that ORS names."""
    version = registry[environment].version
    match kind:
        case "openenv":
            return OpenEnvShape(sessions, environment, version, tools, access)
        case "mcp":
            return McpShape(sessions, environment, version)
        case "ors":
            start = f"{environment}."
            others = {name.removeprefix(start): name for name in registry if name.startswith(start)}
            return OrsShape(sessions, environment, {"train": environment, **others}, tasks)


def served(
    served_as: Shape, sessions: Sessions, *, access: Access, on_exit: Callable[[], Awaitable[None]] | None = None
) -> FastAPI:
    """Return the application. It expires sessions while it runs, and ends all before `on_exit`."""

    app = application(
        "env_serve",
        registry=REGISTRY,
        ready=lambda: "stopping" if sessions.draining else None,
        status=sessions.status,
        lifespan=session_lifespan(sessions, after_sweep=served_as.sweep, on_exit=on_exit),
        access=access,
        body_limits={"/": MAX_BYTES},
    )
    served_as.add_routes(app)
    return app
