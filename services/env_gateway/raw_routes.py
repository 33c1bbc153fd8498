"""Routes that bypass FastAPI's parameters, models and responses, which take longer than an environment's step.

They are part of the OpenAPI document, and their errors reach the application's exception handlers.
"""

import re
from collections.abc import AsyncIterator, Mapping, Sequence
from inspect import Parameter, Signature
from typing import Annotated, Any

from fastapi import FastAPI, Header, Request
from fastapi.routing import APIRoute
from starlette.types import Receive, Scope, Send

from palimpsest.common.control.error_replies import COMMON_ERRORS, documented
from palimpsest.common.sessions.wire import Wire

MAX_KEY = 255
"""Longest Idempotency-Key, in characters."""
LINES = "application/x-ndjson"
"""Media type of lines of JSON."""
IdempotencyKey = Annotated[str | None, Header(max_length=MAX_KEY)]


class RawRoute(APIRoute):
    """A route whose endpoint takes the request and returns the reply's JSON as bytes."""

    def __init__(self, path: str, endpoint: Any, **options: Any) -> None:
        super().__init__(path, endpoint, response_model=None, **options)
        self.app = self._answer
        self._status = options["status_code"]

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        body: bytes = await self.endpoint(Request(scope, receive))
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": self._status, "headers": headers})
        await send({"type": "http.response.body", "body": body})


class StreamRoute(APIRoute):
    """A route whose endpoint returns lines of JSON, which are sent as they come."""

    def __init__(self, path: str, endpoint: Any, **options: Any) -> None:
        super().__init__(path, endpoint, response_model=None, **options)
        self.app = self._answer

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        lines: AsyncIterator[bytes] = await self.endpoint(Request(scope, receive))
        headers = [(b"content-type", LINES.encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async for line in lines:
            await send({"type": "http.response.body", "body": line + b"\n", "more_body": True})
        await send({"type": "http.response.body", "body": b""})


def post_lines(
    app: FastAPI, path: str, endpoint: Any, *, takes: type[Wire], gives: type[Wire], errors: Sequence[int]
) -> None:
    """Add a POST route that is matched before all others and replies with lines of JSON.

    gives: each line. errors: its statuses besides those of every route.
    """
    endpoint.__signature__ = Signature([Parameter("body", Parameter.KEYWORD_ONLY, annotation=takes)])
    described = {"description": f"Lines of JSON, each a {gives.__name__}", "content": {LINES: {}}}
    route = StreamRoute(
        path, endpoint, methods=["POST"], responses={200: described, **documented(*COMMON_ERRORS, *errors)}
    )
    app.router.routes.insert(0, route)


def post(
    app: FastAPI,
    path: str,
    endpoint: Any,
    *,
    takes: type[Wire] | None = None,
    gives: type[Wire],
    status: int = 200,
    keyed: bool = False,
    links: Mapping[str, str] | None = None,
    errors: Sequence[int],
) -> None:
    """Add a raw POST route that is matched before all others.

    keyed: the route takes an Idempotency-Key. links: name -> "METHOD path" of routes that take `session_id` from the
    reply. errors: its statuses besides those of every route.
    """
    documentation: dict[str, Any] = dict.fromkeys(re.findall(r"{(\w+)}", path), str)
    if takes:
        documentation["body"] = takes
    if keyed:
        documentation["idempotency_key"] = IdempotencyKey
    # FastAPI reads the parameters from the signature; the route itself passes the request
    endpoint.__signature__ = Signature(
        [
            Parameter(
                name,
                Parameter.KEYWORD_ONLY,
                annotation=kind,
                default=None if kind is IdempotencyKey else Parameter.empty,
            )
            for name, kind in documentation.items()
        ]
    )
    app.router.routes.insert(
        0,
        RawRoute(
            path,
            endpoint,
            methods=["POST"],
            status_code=status,
            responses={status: {"model": gives, "links": _links(links or {})}, **documented(*COMMON_ERRORS, *errors)},
        ),
    )


def _links(named: Mapping[str, str]) -> dict[str, Any]:
    """Return the OpenAPI links: where the `session_id` of the reply can be used."""
    targets = {name: target.split(" ") for name, target in named.items()}
    return {
        name: {
            "operationRef": f"#/paths/{path.replace('/', '~1')}/{method.lower()}",
            "parameters": {"session_id": "$response.body#/session_id"},
        }
        for name, (method, path) in targets.items()
    }
