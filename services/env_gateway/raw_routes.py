"""Routes that bypass FastAPI's parameters, models and responses, which take longer than an environment's step.

They are part of the OpenAPI document, and their errors reach the application's exception handlers.
"""

from typing import Any

from fastapi import FastAPI, Request
from fastapi.routing import APIRoute
from starlette.types import Receive, Scope, Send

from palimpsest.common.sessions.wire import Wire


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


def post(
    app: FastAPI, path: str, endpoint: Any, *, takes: type[Wire] | None = None, gives: type[Wire], status: int = 200
) -> None:
    """Add a raw POST route that is matched before all others."""
    content = {"application/json": {"schema": takes.model_json_schema()}} if takes else None
    app.router.routes.insert(
        0,
        RawRoute(
            path,
            endpoint,
            methods=["POST"],
            status_code=status,
            responses={status: {"model": gives}},
            openapi_extra={"requestBody": {"required": True, "content": content}} if content else None,
        ),
    )
