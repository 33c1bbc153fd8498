"""The rollout worker's side of a session: retries are safe because steps are numbered."""

import asyncio
import json
import os
import time
from types import TracebackType
from typing import Any, Self, TypeVar

import aiohttp

from palimpsest.common.outages import GATEWAY, OUTAGES, Outages
from palimpsest.common.sessions.token import token
from palimpsest.common.sessions.wire import CreateSession, Lease, Session, Step, TakeStep, TextAction, Wire

W = TypeVar("W", bound=Wire)
TRIES = 6
"""Of a call that the gateway answers with "later"."""
PATIENCE_S = 120.0
"""An outage of the gateway that is shorter costs time, and the sessions that a gateway started again has forgotten."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 3.2
"""Before the second try; doubles for each further one."""


class SessionFailed(Exception):
    """The gateway or the environment could not do what was asked: the reward stays unknown."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code


class SessionClient:
    """Talks to one gateway; many sessions at once. Sends the token of PALIMPSEST_GATEWAY_TOKEN, if there is one."""

    def __init__(self, url: str, *, timeout_s: float, connections: int, outages: Outages = OUTAGES) -> None:
        self._url, self._outages = url.rstrip("/"), outages
        secret = token(os.environ)
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {secret}"} if secret else {})
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

    async def create(self, wanted: CreateSession, *, idempotency_key: str) -> Session:
        """Begin a session; the key makes a repeated call return the same one. Raises SessionFailed."""
        body = await self._call("POST", "/v1/sessions", wanted, {"Idempotency-Key": idempotency_key})
        return Session.model_validate_json(body)

    async def step(self, session_id: str, number: int, text: str) -> Step:
        """Hand over what the model wrote. Raises SessionFailed."""
        taken = TakeStep(step=number, action=TextAction(text=text))
        return Step.model_validate_json(await self._call("POST", f"/v1/sessions/{session_id}/step", taken))

    async def heartbeat(self, session_id: str) -> Lease:
        """Keep a session that waits for its next step. Raises SessionFailed."""
        return Lease.model_validate_json(await self._call("POST", f"/v1/sessions/{session_id}/heartbeat"))

    async def finalize(self, session_id: str) -> Step:
        """End the session here and have what there is scored. Raises SessionFailed."""
        return Step.model_validate_json(await self._call("POST", f"/v1/sessions/{session_id}/finalize"))

    async def close(self, session_id: str) -> None:
        """Forget the session. Raises SessionFailed."""
        await self._call("DELETE", f"/v1/sessions/{session_id}")

    async def _call(
        self, method: str, path: str, sent: Wire | None = None, headers: dict[str, str] | None = None
    ) -> bytes:
        assert self._http is not None, "use the client as a context"
        data = sent.model_dump_json().encode() if sent is not None else None
        tries, pause_s, late = 0, FIRST_PAUSE_S, time.monotonic() + PATIENCE_S
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
                    code, message, retryable = "unreachable", f"{type(error).__name__}: {error}", True
                left_s = late - time.monotonic()
                if code == "unreachable":
                    outage.record_failure(GATEWAY, self._url, message, until=self._outages.now() + max(0.0, left_s))
                    retryable = left_s > pause_s or tries < TRIES
                if not retryable or (tries >= TRIES and code != "unreachable"):
                    raise SessionFailed(code, f"{method} {path}: {message}")
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


def _problem(status: int, body: bytes) -> tuple[str, str, bool]:
    try:
        said: dict[str, Any] = json.loads(body)
        return str(said["code"]), str(said["message"]), bool(said.get("retryable", False))
    except (ValueError, KeyError, TypeError):
        return f"http_{status}", body[:200].decode("utf-8", "replace"), status in (429, 502, 503, 504)
