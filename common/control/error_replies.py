"""Gives every error of an application the shape of errors.py, and documents it in OpenAPI."""

from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match

from palimpsest.common.control.errors import ErrorReply, HttpError

COMMON_ERRORS = (400, 401, 403, 404, 405, 408, 413, 422, 429, 431, 503)
"""The statuses with which any route may answer."""


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the OpenAPI responses of these error statuses, for the `responses` of a route."""
    return {status: {"model": ErrorReply, "description": HTTPStatus(status).phrase} for status in statuses}


def answer_errors_alike(app: FastAPI, on_error: Callable[[str], None] = lambda _: None) -> None:
    """Give every error reply the same shape. on_error: called with the code of each."""

    def reply(error: HttpError, headers: dict[str, str] | None = None) -> JSONResponse:
        on_error(error.body["code"])
        return JSONResponse(error.body, error.status, error.headers | (headers or {}))

    @app.exception_handler(HttpError)
    async def refused(_request: Request, error: HttpError) -> JSONResponse:
        return reply(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(_request: Request, error: RequestValidationError) -> JSONResponse:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:5])
        return reply(HttpError(422, "invalid_request", problems))

    @app.exception_handler(HTTPException)
    async def unrouted(request: Request, error: HTTPException) -> JSONResponse:
        code = {404: "unknown_route", 405: "wrong_method"}.get(error.status_code, "refused")
        headers = dict(error.headers or {})
        if error.status_code == 405:
            headers["Allow"] = ", ".join(_methods(request))
        return reply(HttpError(error.status_code, code, f"{request.method}: {error.detail}"), headers)

    @app.exception_handler(ClientDisconnect)
    async def left(_request: Request, _error: ClientDisconnect) -> Response:
        return Response(status_code=400)  # the client has disconnected

    @app.exception_handler(Exception)
    async def broken(_request: Request, error: Exception) -> JSONResponse:
        message = f"the service failed: {type(error).__name__}; its log has the traceback"
        return JSONResponse(HttpError(500, "internal", message).body, 500)


def _methods(request: Request) -> list[str]:
    """Return the methods of every route with this path; the router's own Allow header has those of the first only."""
    routes = [route for route in request.app.routes if route.matches(request.scope)[0] is not Match.NONE]
    return sorted({method for route in routes for method in getattr(route, "methods", None) or ()})
