"""The gateway over HTTP (docs/gateway.md).

GET     /v1/envs                        all environments
GET     /v1/envs/{name}
POST    /v1/sessions                    begin a session; the same Idempotency-Key returns the same session
POST    /v1/sessions/{id}/step          {"step": next_step, "action": {...}}
POST    /v1/steps                       {"steps": [{"session_id": id, "step": ..., "action": ...}, ...]}
POST    /v1/sessions/{id}/heartbeat     renew the lease
POST    /v1/sessions/{id}/finalize      end the session and score its current state
GET     /v1/sessions/{id}
DELETE  /v1/sessions/{id}
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

from fastapi import FastAPI, Request
from pydantic import ValidationError

from palimpsest.common.control import drain, log_level
from palimpsest.common.control.access import Access, AccessRule, Role
from palimpsest.common.control.errors import HttpError
from palimpsest.common.metrics import REGISTRY
from palimpsest.common.service import application
from palimpsest.common.sessions import instruments
from palimpsest.common.sessions.registry import Entry, Registry
from palimpsest.common.sessions.sessions import Sessions
from palimpsest.common.sessions.wire import (
    CreateSession,
    EnvironmentInfo,
    Lease,
    Session,
    SessionState,
    Step,
    StepOutcome,
    TakeStep,
    TakeSteps,
    Wire,
)
from palimpsest.services.env_gateway import raw_routes
from palimpsest.services.env_gateway.batches import take_all
from palimpsest.services.env_gateway.session_lifespan import session_lifespan

W = TypeVar("W", bound=Wire)
RULES = (
    AccessRule("GET", "/v1/envs", (Role.VIEW,)),
    AccessRule("DELETE", "/v1/sessions/", (Role.SERVICE, Role.OPERATE)),
)
"""Roles of the routes that do not need `service` alone."""


def create_app(
    sessions: Sessions,
    registry: Registry,
    *,
    access: Access | None = None,
    request_limit_bytes: int = 2**20,
    on_exit: Callable[[], Awaitable[None]] | None = None,
    on_drained: Callable[[], None] = lambda: None,
) -> FastAPI:
    """Return the gateway's application. It expires sessions while it runs and drains them before `on_exit`.

    on_drained: called when a person drains the gateway and the last session has ended.
    """
    draining = asyncio.Event()

    def end_drain() -> None:
        if draining.is_set() and not sessions.live:
            on_drained()

    app = application(
        "env_gateway",
        registry=REGISTRY,
        ready=lambda: "stopping" if sessions.draining else None,
        status=sessions.status,
        lifespan=session_lifespan(sessions, after_sweep=end_drain, on_exit=on_exit),
        access=access,
        rules=(*RULES, *drain.RULES, *log_level.RULES),
        body_limits={"/v1/sessions": request_limit_bytes, "/v1/steps": request_limit_bytes},
        on_error=lambda code: instruments.REFUSED.labels(code).inc(),
    )
    _add_environment_routes(app, registry)
    _add_session_routes(app, sessions)

    def begin_draining() -> None:
        sessions.refuse_new()
        draining.set()

    app.include_router(drain.drain_routes(begin_draining, lambda: sessions.live))
    app.include_router(log_level.level_routes())
    return app


def _add_environment_routes(app: FastAPI, registry: Registry) -> None:
    @app.get("/v1/envs")
    async def environments() -> dict[str, list[EnvironmentInfo]]:
        """All environments."""
        return {"environments": [_info(entry) for entry in registry.values()]}

    @app.get("/v1/envs/{name}")
    async def environment(name: str) -> EnvironmentInfo:
        """One environment."""
        if name not in registry:
            raise HttpError(404, "unknown_environment", f"no environment {name!r}; GET /v1/envs has all")
        return _info(registry[name])


def _add_session_routes(app: FastAPI, sessions: Sessions) -> None:
    async def create(request: Request) -> bytes:
        """Begin a session, or return the session that the same Idempotency-Key began."""
        key = request.headers.get("idempotency-key") or None
        if key is not None and len(key) > raw_routes.MAX_KEY:
            raise HttpError(422, "invalid_request", f"an Idempotency-Key has at most {raw_routes.MAX_KEY} characters")
        return await sessions.create(_parsed(CreateSession, await request.body()), key)

    async def step(request: Request) -> bytes:
        """Take a step; a repeated step returns the stored reply."""
        taken = _parsed(TakeStep, await request.body())
        return await sessions.step(request.path_params["session_id"], taken)

    async def finalize(request: Request) -> bytes:
        """End the session and score its current state."""
        return await sessions.finalize(request.path_params["session_id"])

    async def heartbeat(request: Request) -> bytes:
        """Renew the lease."""
        return sessions.heartbeat(request.path_params["session_id"]).model_dump_json().encode()

    raw_routes.post(app, "/v1/sessions/{session_id}/heartbeat", heartbeat, gives=Lease, errors=(410,))
    raw_routes.post(app, "/v1/sessions/{session_id}/finalize", finalize, gives=Step, errors=(410,))
    raw_routes.post(
        app,
        "/v1/sessions",
        create,
        takes=CreateSession,
        gives=Session,
        status=201,
        keyed=True,
        links={
            "step": "POST /v1/sessions/{session_id}/step",
            "heartbeat": "POST /v1/sessions/{session_id}/heartbeat",
            "finalize": "POST /v1/sessions/{session_id}/finalize",
            "state": "GET /v1/sessions/{session_id}",
            "close": "DELETE /v1/sessions/{session_id}",
        },
        errors=(409, 410, 502),
    )

    async def steps(request: Request) -> AsyncIterator[bytes]:
        """Take steps of several sessions; each has its own outcome, sent when it is known."""
        return take_all(sessions, _parsed(TakeSteps, await request.body()))

    raw_routes.post_lines(app, "/v1/steps", steps, takes=TakeSteps, gives=StepOutcome, errors=())
    raw_routes.post(app, "/v1/sessions/{session_id}/step", step, takes=TakeStep, gives=Step, errors=(409, 410))

    @app.get("/v1/sessions/{session_id}")
    async def state(session_id: str) -> SessionState:
        """The state of the session."""
        return sessions.state(session_id)

    @app.delete("/v1/sessions/{session_id}", status_code=204)
    async def close(session_id: str) -> None:
        """End the session at once, even during a step; no effect if it has ended."""
        sessions.close(session_id)


def _parsed(expected: type[W], body: bytes) -> W:
    try:
        return expected.model_validate_json(body)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'body'}: {e['msg']}" for e in error.errors()[:5])
        raise HttpError(422, "invalid_request", problems) from None


def _info(entry: Entry) -> EnvironmentInfo:
    return EnvironmentInfo(
        name=entry.name, version=entry.version, description=entry.description, isolated=entry.isolated
    )
