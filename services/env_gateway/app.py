"""The gateway over HTTP (docs/gateway.md).

GET     /v1/envs                        all environments
GET     /v1/envs/{name}
POST    /v1/sessions                    begin a session; the same Idempotency-Key returns the same session
POST    /v1/sessions/{id}/step          {"step": next_step, "action": {...}}
POST    /v1/sessions/{id}/heartbeat     renew the lease
POST    /v1/sessions/{id}/finalize      end the session and score its current state
GET     /v1/sessions/{id}
DELETE  /v1/sessions/{id}
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from palimpsest.common.metrics import REGISTRY
from palimpsest.common.service import HttpError, application
from palimpsest.common.sessions.wire import (
    CreateSession,
    EnvironmentInfo,
    Lease,
    Session,
    SessionState,
    Step,
    TakeStep,
    Wire,
)
from palimpsest.services.env_gateway import instruments, raw_routes
from palimpsest.services.env_gateway.auth import BearerAuth
from palimpsest.services.env_gateway.registry import Entry, Registry
from palimpsest.services.env_gateway.sessions import Sessions

W = TypeVar("W", bound=Wire)
SWEEP_S = 1.0
"""Interval between checks for expired leases, in seconds."""
MAX_KEY = 255
"""Longest Idempotency-Key, in characters."""


def create_app(
    sessions: Sessions,
    registry: Registry,
    *,
    token: str | None = None,
    request_limit_bytes: int = 2**20,
    on_exit: Callable[[], Awaitable[None]] | None = None,
) -> FastAPI:
    """Return the gateway's application. It expires sessions while it runs and drains them before `on_exit`."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        sweeping = asyncio.create_task(_sweep(sessions))
        yield
        sweeping.cancel()
        with suppress(asyncio.CancelledError):
            await sweeping
        sessions.drain()
        if on_exit is not None:
            await on_exit()

    app = application(
        "env_gateway",
        registry=REGISTRY,
        ready=lambda: "stopping" if sessions.draining else None,
        status=sessions.status,
        lifespan=lifespan,
    )
    if token is not None:
        app.add_middleware(BearerAuth, token=token)
    _answer_errors_alike(app)
    _add_environment_routes(app, registry)
    _add_session_routes(app, sessions, request_limit_bytes)
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


def _add_session_routes(app: FastAPI, sessions: Sessions, limit: int) -> None:
    async def create(request: Request) -> bytes:
        """Begin a session, or return the session that the same Idempotency-Key began."""
        key = request.headers.get("idempotency-key") or None
        if key is not None and len(key) > MAX_KEY:
            raise HttpError(422, "invalid_request", f"an Idempotency-Key has at most {MAX_KEY} characters")
        return await sessions.create(_parsed(CreateSession, await _body(request, limit)), key)

    async def step(request: Request) -> bytes:
        """Take a step; a repeated step returns the stored reply."""
        taken = _parsed(TakeStep, await _body(request, limit))
        return await sessions.step(request.path_params["session_id"], taken)

    async def finalize(request: Request) -> bytes:
        """End the session and score its current state."""
        return await sessions.finalize(request.path_params["session_id"])

    async def heartbeat(request: Request) -> bytes:
        """Renew the lease."""
        return sessions.heartbeat(request.path_params["session_id"]).model_dump_json().encode()

    raw_routes.post(app, "/v1/sessions/{session_id}/heartbeat", heartbeat, gives=Lease)
    raw_routes.post(app, "/v1/sessions/{session_id}/finalize", finalize, gives=Step)
    raw_routes.post(app, "/v1/sessions", create, takes=CreateSession, gives=Session, status=201)
    raw_routes.post(app, "/v1/sessions/{session_id}/step", step, takes=TakeStep, gives=Step)

    @app.get("/v1/sessions/{session_id}")
    async def state(session_id: str) -> SessionState:
        """The state of the session."""
        return sessions.state(session_id)

    @app.delete("/v1/sessions/{session_id}", status_code=204)
    async def close(session_id: str) -> None:
        """End the session at once, even during a step; no effect if it has ended."""
        sessions.close(session_id)


def _answer_errors_alike(app: FastAPI) -> None:
    """Give every error the same body: {code, message, retryable}."""

    @app.exception_handler(HttpError)
    async def refused(_request: Request, error: HttpError) -> JSONResponse:
        instruments.REFUSED.labels(error.body["code"]).inc()
        return JSONResponse(error.body, error.status, error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return await refused(request, HttpError(422, "invalid_request", str(error.errors())))

    @app.exception_handler(HTTPException)
    async def unrouted(request: Request, error: HTTPException) -> JSONResponse:
        code = {404: "unknown_route", 405: "wrong_method"}.get(error.status_code, "refused")
        return await refused(request, HttpError(error.status_code, code, f"{request.method}: {error.detail}"))

    @app.exception_handler(ClientDisconnect)
    async def left(_request: Request, _error: ClientDisconnect) -> Response:
        return Response(status_code=400)  # the client has disconnected

    @app.exception_handler(Exception)
    async def broken(_request: Request, error: Exception) -> JSONResponse:
        problem = HttpError(500, "internal", f"the gateway failed: {type(error).__name__}", retryable=False)
        return JSONResponse(problem.body, 500)


async def _sweep(sessions: Sessions) -> None:
    while True:
        await asyncio.sleep(SWEEP_S)
        sessions.sweep()


async def _body(request: Request, limit: int) -> bytes:
    """Return the body. Raises HttpError (413) as soon as it exceeds the limit."""
    if int(request.headers.get("content-length", 0)) > limit:
        raise _too_long(limit)
    body = b""
    async for part in request.stream():
        body = body + part if body else part
        if len(body) > limit:
            raise _too_long(limit)
    return body


def _too_long(limit: int) -> HttpError:
    return HttpError(413, "too_large", f"a request has at most {limit} bytes (env_gateway.request_limit_bytes)")


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
