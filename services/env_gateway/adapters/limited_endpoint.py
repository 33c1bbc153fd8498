"""An OpenAI-compatible endpoint with limits for one session: requests, tokens and seconds.

Each attempt is one request: the first one, a retry, and a call of a judge alike. The seconds run from the beginning of
a call to its end, with the pauses before retries. Tokens are what a reply reports as `usage`, prompt and completion. A
reply without a usable `usage` counts one token for each byte of the request's body and of the reply's, because a token
of a text has at least one byte. A request without a reply of status 200 counts no tokens.

A failure lasts: once a limit is reached or the endpoint fails, each later call raises the same error without a request.
"""

import asyncio
import json
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx

ATTEMPTS = 3
"""Requests of one call at most."""
PAUSE_S = 0.5
"""Before the first retry; twice as much before the second."""
REPLY_BYTES = 4 * 2**20
TRANSIENT = (408, 409, 425, 429)
"""Statuses below 500 that are tried again."""


class EndpointFailed(Exception):
    """A limit of the session is reached, or the endpoint gives no usable reply. The text tells which."""


class _AttemptFailed(Exception):
    """One attempt gave no usable reply."""

    def __init__(self, reason: str, *, again: bool = True) -> None:
        super().__init__(reason)
        self.again = again


@dataclass(frozen=True)
class EndpointLimits:
    """Limits of a session."""

    requests: int
    tokens: int
    seconds: float
    request_s: float
    """Seconds of one request."""


class _Lookups(ThreadPoolExecutor):
    """Looks up the addresses of hosts. A lookup cannot be interrupted, so the end of a request does not wait for it."""

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:  # noqa: ARG002
        super().shutdown(wait=False, cancel_futures=cancel_futures)


class LimitedEndpoint:
    """One session's access to `url`/chat/completions. Not for several threads."""

    def __init__(self, url: str, token: str, limits: EndpointLimits) -> None:
        self._url = f"{url.rstrip('/')}/chat/completions"
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._headers["Content-Type"] = "application/json"
        self._limits = limits
        self.requests = self.tokens = 0
        self.seconds = 0.0
        self.failure: EndpointFailed | None = None
        """The first failure."""

    def complete(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Return the reply to this request, with `choices[0].message`. Raises EndpointFailed."""
        if self.failure is not None:
            raise EndpointFailed(str(self.failure))
        started, before = time.monotonic(), self.seconds
        try:
            return self._complete(json.dumps(body).encode(), started)
        except EndpointFailed as error:
            self.failure = error
            raise
        finally:
            self.seconds = before + time.monotonic() - started

    def _complete(self, body: bytes, started: float) -> dict[str, Any]:
        deadline = started + self._limits.seconds - self.seconds
        reason = ""
        for attempt in range(ATTEMPTS):
            after = f"; the last attempt: {reason}" if reason else ""
            if attempt:
                time.sleep(max(0.0, min(PAUSE_S * 2 ** (attempt - 1), deadline - time.monotonic())))
            if self.requests >= self._limits.requests:
                raise EndpointFailed(f"the session has made {self.requests} requests to {self._url}, its limit{after}")
            if (left := deadline - time.monotonic()) <= 0.0:
                raise self._late(after)
            self.requests += 1
            try:
                return self._attempt(body, min(left, self._limits.request_s))
            except _AttemptFailed as error:
                reason = str(error)
                if not error.again:
                    break
        if time.monotonic() >= deadline:
            raise self._late(f"; the last attempt: {reason}")
        raise EndpointFailed(f"{self._url} gave no usable reply in {attempt + 1} attempts: {reason}")

    def _late(self, after: str) -> EndpointFailed:
        return EndpointFailed(f"the session has spent {self._limits.seconds:g} s at {self._url}, its limit{after}")

    def _attempt(self, body: bytes, limit_s: float) -> dict[str, Any]:
        try:
            status, content = asyncio.run(asyncio.wait_for(self._post(body), limit_s))
        except TimeoutError:
            raise _AttemptFailed(f"no complete reply within {limit_s:.3g} s") from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise _AttemptFailed(f"{type(error).__name__}: {error}") from None
        if status != 200:
            shown = content[:200].decode(errors="replace")
            raise _AttemptFailed(f"status {status}: {shown}", again=status >= 500 or status in TRANSIENT)
        try:
            reply = json.loads(content)
        except (ValueError, RecursionError):
            reply = None
        self.tokens += used(reply, len(body) + len(content))
        if self.tokens > self._limits.tokens:
            raise EndpointFailed(
                f"the session has used {self.tokens} tokens at {self._url}, more than its limit {self._limits.tokens}"
            )
        if not is_completion(reply):
            shown = content[:200].decode(errors="replace")
            raise _AttemptFailed(f"the reply is no chat completion: {shown}")
        return dict(reply)

    async def _post(self, body: bytes) -> tuple[int, bytes]:
        """Return the status and the body. Only the caller limits the time, for a server can send byte after byte."""
        asyncio.get_running_loop().set_default_executor(_Lookups(max_workers=1))
        content = bytearray()
        async with (
            httpx.AsyncClient(timeout=httpx.Timeout(None)) as client,
            client.stream("POST", self._url, content=body, headers=self._headers) as response,
        ):
            async for part in response.aiter_bytes():
                content += part
                if len(content) > REPLY_BYTES:
                    raise _AttemptFailed(f"the reply is longer than {REPLY_BYTES} bytes", again=False)
        return response.status_code, bytes(content)


def used(reply: Any, size: int) -> int:
    """Return the tokens of a reply. size: bytes of the request's and the reply's body, which count without `usage`.

    >>> used({"usage": {"prompt_tokens": 5, "completion_tokens": 2}}, 100), used({}, 100)
    (7, 100)
    """
    usage = reply.get("usage") if isinstance(reply, dict) else None
    counts = [usage.get(key) for key in ("prompt_tokens", "completion_tokens")] if isinstance(usage, dict) else [None]
    whole = [count for count in counts if type(count) is int and count >= 0]
    return sum(whole) if len(whole) == 2 and sum(whole) > 0 else size


def is_completion(reply: Any) -> bool:
    """Return whether the first choice is a message of the model with a text or with calls of functions."""
    try:
        message = reply["choices"][0]["message"]
        text, calls = message.get("content"), message.get("tool_calls") or []
        functions = [json.loads(call["function"]["arguments"]) for call in calls]
        named = all(isinstance(call["function"]["name"], str) and isinstance(call["id"], str) for call in calls)
    except (AttributeError, KeyError, IndexError, TypeError, ValueError, RecursionError):
        return False
    spoken = isinstance(text, str) and bool(text.strip())
    return (spoken or (text in (None, "") and bool(calls))) and named and all(isinstance(f, dict) for f in functions)
