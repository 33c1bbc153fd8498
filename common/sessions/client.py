"""Client of the environment gateway, for rollout workers. Retries are safe because steps are numbered."""

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

import aiohttp

from palimpsest.common.control.credentials import authorization
from palimpsest.common.outages import GATEWAY, OUTAGES, Outages
from palimpsest.common.sessions.port import (
    CAPACITY,
    DRAINING,
    FIRST_PAUSE_S,
    LONGEST_PAUSE_S,
    PATIENCE_S,
    UNREACHABLE,
    SessionFailed,
)
from palimpsest.common.sessions.step_batches import StepBatches
from palimpsest.common.sessions.wire import (
    BatchedStep,
    CreateSession,
    Lease,
    Session,
    Step,
    StepOutcome,
    TakeStep,
    TakeSteps,
    TextAction,
    Wire,
)

W = TypeVar("W", bound=Wire)
TRIES = 6
"""Attempts at a call that the gateway answers with a retryable error."""


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
        self._batches = StepBatches(self._send_batch, self._step_alone)

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
        await self._batches.close()
        await self._http.close()

    async def create(self, request: CreateSession, *, idempotency_key: str, capacity_s: float = PATIENCE_S) -> Session:
        """See EnvironmentSessions."""
        body = await self._call(
            "POST", "/v1/sessions", request, {"Idempotency-Key": idempotency_key}, capacity_s=capacity_s
        )
        return Session.model_validate_json(body)

    async def step(self, session_id: str, number: int, text: str) -> Step:
        """See EnvironmentSessions. Steps that are taken at the same moment share a request."""
        action = TextAction(type="text", text=text)
        return await self._batches.step(
            BatchedStep(session_id=session_id, step=number, action=action), length=len(text)
        )

    async def heartbeat(self, session_id: str) -> Lease:
        """See EnvironmentSessions."""
        return Lease.model_validate_json(await self._call("POST", f"/v1/sessions/{session_id}/heartbeat"))

    async def finalize(self, session_id: str) -> Step:
        """See EnvironmentSessions."""
        return Step.model_validate_json(await self._call("POST", f"/v1/sessions/{session_id}/finalize"))

    async def close(self, session_id: str) -> None:
        """See EnvironmentSessions."""
        await self._call("DELETE", f"/v1/sessions/{session_id}")

    async def _step_alone(self, step: BatchedStep) -> Step:
        taken = TakeStep(step=step.step, action=step.action)
        return Step.model_validate_json(await self._call("POST", f"/v1/sessions/{step.session_id}/step", taken))

    async def _send_batch(self, steps: Sequence[BatchedStep]) -> AsyncIterator[StepOutcome]:
        """Yield the outcomes of a batch as they arrive. Raises ClientError, TimeoutError, ValueError."""
        assert self._http is not None, "use the client as a context manager"
        data = TakeSteps(steps=tuple(steps)).model_dump_json().encode()
        async with self._http.post(f"{self._url}/v1/steps", data=data, raise_for_status=True) as reply:
            async for line in reply.content:
                yield StepOutcome.model_validate_json(line)

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
