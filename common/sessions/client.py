"""Client of the environment gateway, for rollout workers. Retries are safe because steps are numbered."""

import asyncio
import json
import os
import time
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any, Self, TypeVar

import aiohttp

from palimpsest.common.control.credentials import authorization
from palimpsest.common.outages import GATEWAY, OUTAGES, Outages
from palimpsest.common.sessions.wire import CreateSession, Lease, Session, Step, TakeStep, TextAction, Wire

W = TypeVar("W", bound=Wire)
TRIES = 6
"""Attempts at a call that the gateway answers with a retryable error."""
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


class SessionClient:
    """Client of one gateway for many concurrent sessions. Sends PALIMPSEST_SERVICE_TOKEN, if it is set."""

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float,
        connections: int,
        outages: Outages = OUTAGES,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """`clock`, `sleep`: measure the pauses between two attempts, in seconds."""
        self._url, self._outages = url.rstrip("/"), outages
        self._clock, self._sleep = clock, sleep
        self._headers = {"Content-Type": "application/json"} | authorization(os.environ)
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)
        self._connections = connections
        self._http: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._http = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=self._connections, keepalive_timeout=30),
            timeout=self._timeout,
            headers=self._headers,
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._http is not None
        await self._http.close()

    async def create(self, request: CreateSession, *, idempotency_key: str, capacity_s: float = PATIENCE_S) -> Session:
        """Create a session. A repeated call with the same key returns the same session. Raises SessionFailed.

        capacity_s: time for a place of the gateway to become free, in seconds.
        """
        body = await self._call(
            "POST", "/v1/sessions", request, {"Idempotency-Key": idempotency_key}, capacity_s=capacity_s
        )
        return Session.model_validate_json(body)

    async def step(self, session_id: str, number: int, text: str) -> Step:
        """Send the model message of step `number`. Raises SessionFailed."""
        taken = TakeStep(step=number, action=TextAction(type="text", text=text))
        return Step.model_validate_json(await self._call("POST", f"/v1/sessions/{session_id}/step", taken))

    async def heartbeat(self, session_id: str) -> Lease:
        """Renew the lease of a session. Raises SessionFailed."""
        return Lease.model_validate_json(await self._call("POST", f"/v1/sessions/{session_id}/heartbeat"))

    async def finalize(self, session_id: str) -> Step:
        """End the session and score the steps so far. Raises SessionFailed."""
        return Step.model_validate_json(await self._call("POST", f"/v1/sessions/{session_id}/finalize"))

    async def close(self, session_id: str) -> None:
        """Delete the session. Raises SessionFailed."""
        await self._call("DELETE", f"/v1/sessions/{session_id}")

    async def _call(
        self,
        method: str,
        path: str,
        sent: Wire | None = None,
        headers: dict[str, str] | None = None,
        *,
        capacity_s: float = PATIENCE_S,
    ) -> bytes:
        assert self._http is not None, "use the client as a context manager"
        data = sent.model_dump_json().encode() if sent is not None else None
        tries, pause_s, began = 0, FIRST_PAUSE_S, self._clock()
        patience_s = {UNREACHABLE: PATIENCE_S, DRAINING: PATIENCE_S, CAPACITY: capacity_s}
        with self._outages.waiting() as outage:
            while True:
                tries += 1
                try:
                    async with self._http.request(method, self._url + path, data=data, headers=headers) as reply:
                        body = await reply.read()
                        if reply.status < 400:
                            return body
                        code, message, retryable = _problem(reply.status, body)
                        outage.record_answer()
                except (aiohttp.ClientError, TimeoutError) as error:
                    code, message, retryable = UNREACHABLE, f"{type(error).__name__}: {error}", True
                left_s = began + patience_s.get(code, 0.0) - self._clock()
                if code == UNREACHABLE:
                    outage.record_failure(GATEWAY, self._url, message, until=self._outages.now() + max(0.0, left_s))
                if not retryable or (left_s <= pause_s and tries >= TRIES):
                    raise SessionFailed(code, f"{method} {path}: {message}")
                await self._sleep(pause_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


def _problem(status: int, body: bytes) -> tuple[str, str, bool]:
    try:
        error: dict[str, Any] = json.loads(body)
        return str(error["code"]), str(error["message"]), bool(error.get("retryable", False))
    except (ValueError, KeyError, TypeError):
        return f"http_{status}", body[:200].decode("utf-8", "replace"), status in (429, 502, 503, 504)
