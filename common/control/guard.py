"""ASGI middleware in front of every route: access, and limits of headers and bodies in size and time."""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from palimpsest.common.control.access import COMMON_RULES, Access, AccessRule, Token
from palimpsest.common.control.changes import Caller
from palimpsest.common.control.errors import HttpError

BODY_BYTES = 64 * 1024
"""Maximum size of a body, unless the route states its own."""


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """Limits of every request."""

    header_bytes: int = 64 * 1024
    header_s: float = 30.0
    """Time from the first byte of a request, or from the connection, to the end of its headers."""
    keep_alive_s: float = 75.0
    """Time between two requests on a connection."""
    body_s: float = 60.0
    """Time for a whole body; for an upload without a limit in bytes, the time between two pieces."""


LIMITS = RequestLimits()


class RequestGuard:
    """Refuses what is not permitted or exceeds a limit, with the error shape of errors.py.

    access: None permits every caller. rules: roles by route, before those that all services share.
    body_limits: start of a path -> maximum size of its bodies in bytes, or None for an upload of any size.
    on_refusal: called with the code of each error.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        access: Access | None = None,
        rules: Sequence[AccessRule] = (),
        body_limits: Mapping[str, int | None],
        limits: RequestLimits = LIMITS,
        on_refusal: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._app, self._access, self._rules = app, access, (*rules, *COMMON_RULES)
        self._body_limits, self._limits, self._on_refusal = body_limits, limits, on_refusal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limit = self._limit(scope["path"])
        try:
            length = self._check(scope, limit)
        except HttpError as error:
            self._on_refusal(error.body["code"])
            body = _Body(receive, BODY_BYTES, self._limits.body_s, length=_announced(scope["headers"]))
            await JSONResponse(error.body, error.status, error.headers)(scope, receive, partial(_send, body, send))
            return
        if length == 0:
            await self._app(scope, receive, send)
            return
        body = _Body(receive, limit, self._limits.body_s, length=length)
        await self._app(scope, body.receive, partial(_send, body, send))

    def _limit(self, path: str) -> int | None:
        for start, limit in self._body_limits.items():
            if path.startswith(start):
                return limit
        return BODY_BYTES

    def _check(self, scope: Scope, limit: int | None) -> int | None:
        """Return the announced size of the body; None if it comes in chunks. Raises HttpError."""
        headers = scope["headers"]
        if sum(len(name) + len(value) for name, value in headers) + len(scope["path"]) > self._limits.header_bytes:
            raise headers_too_large(self._limits.header_bytes)
        if self._access is not None:
            scope["palimpsest.token"] = self._access.check(scope["method"], scope["path"], headers, self._rules)
        if any(name == b"transfer-encoding" for name, _ in headers):
            return None
        length = _announced(headers)
        if length is None:
            raise HttpError(400, "invalid_request", "Content-Length is not a number of bytes")
        if limit is not None and length > limit:
            raise body_too_large(limit)
        return length


def _announced(headers: Sequence[tuple[bytes, bytes]]) -> int | None:
    """Return the announced size of the body, 0 without one; None if it comes in chunks or the size is invalid."""
    if any(name == b"transfer-encoding" for name, _ in headers):
        return None
    sizes = [value for name, value in headers if name == b"content-length"]
    if not sizes:
        return 0
    return int(sizes[0]) if sizes[0].isdigit() and len(sizes[0]) <= 18 else None


class _Body:
    """The body of one request, as it arrives."""

    def __init__(self, receive: Receive, limit: int | None, limit_s: float, *, length: int | None) -> None:
        """length: the announced size, if there is one."""
        self._receive, self._limit, self._limit_s, self._length = receive, limit, limit_s, length
        self._deadline = time.monotonic() + limit_s
        self._size = 0
        self.complete = length == 0
        self._failed = False

    async def drain(self) -> None:
        """Read the rest of a small body: a connection that is closed with unread bytes may lose the reply."""
        if self._length is None or self._length > BODY_BYTES or self._failed:
            return
        with suppress(HttpError):
            while not self.complete:
                await self.receive()

    async def receive(self) -> Message:
        if self.complete:  # the application waits for the client to disconnect, which has no limit
            return await self._receive()
        left_s = self._limit_s if self._limit is None else self._deadline - time.monotonic()
        try:
            async with asyncio.timeout(left_s):
                message = await self._receive()
        except TimeoutError:
            self._failed = True
            raise HttpError(
                408, "too_slow", f"the body did not arrive in {self._limit_s:g} s", retryable=True
            ) from None
        self._size += len(message.get("body", b""))
        self.complete = message["type"] != "http.request" or not message.get("more_body", False)
        if self._limit is not None and self._size > self._limit:
            self.complete = False  # the rest is not read
            raise body_too_large(self._limit)
        return message


def caller_of(scope: Scope) -> Caller:
    """Return who sent a request that passed the guard."""
    token: Token | None = scope.get("palimpsest.token")
    host, _ = scope.get("client") or ("unknown", 0)
    return Caller("local" if token is None else token.name, "" if token is None else token.role.value, host)


async def _send(body: _Body, send: Send, message: Message) -> None:
    """Send a part of the reply; close the connection after it if a long body was not read, because it still arrives."""
    if message["type"] == "http.response.start":
        await body.drain()
    if message["type"] == "http.response.start" and not body.complete:
        message = {**message, "headers": [*message.get("headers", ()), (b"connection", b"close")]}
    await send(message)


def body_too_large(limit: int) -> HttpError:
    """Return the error for a body over the limit."""
    return HttpError(413, "too_large", f"a body of this route has at most {limit} bytes")


def headers_too_large(limit: int) -> HttpError:
    """Return the error for headers over the limit."""
    return HttpError(431, "headers_too_large", f"the headers of a request have at most {limit} bytes")
