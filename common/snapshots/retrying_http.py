"""HTTP client of the snapshot store that retries during an outage, up to a time limit.

The store may send a body itself, or answer 307 with a presigned URL of the S3 behind it. In both cases the client
resumes a broken transfer at the byte where it broke, because stored objects never change.
"""

import os
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import httpx
import msgspec

from palimpsest.common.control.access import SERVICE_TOKEN
from palimpsest.common.control.credentials import authorization
from palimpsest.common.outages import OUTAGES, ROOM, S3, STORE, Outages, Waiting
from palimpsest.common.proxies import our_client, outside_client
from palimpsest.common.time_limits import limit_s
from palimpsest.common.tls import tls_context
from palimpsest.common.user_error import UserError

CHUNK = 1 << 20
"""Bytes of an upload that are read at a time."""
FIRST_PAUSE_S = 0.2
"""Pause before the second attempt, in seconds. It doubles, up to LONGEST_PAUSE_S."""
LONGEST_PAUSE_S = 5.0
FULL_PATIENCE_S = 20.0
"""Time for which a call retries on a full disk, in seconds. It is shorter than the time for outages, because a person
has to free space."""
ROOM_PATIENCE_S = 12 * 3600.0
"""Time for which a call waits for room in the store, in seconds: half of the time for which the learner's lease holds,
because a learner that waits does not renew it."""
_SILENCE_S = 60.0
"""Longest time without a byte in an open call, in seconds."""


def timeout_of(size: int) -> httpx.Timeout:
    """Return the timeouts of a call whose answer comes after the store has written this many bytes."""
    return httpx.Timeout(limit_s(_SILENCE_S, size), connect=5.0)


class StoreUnavailable(Exception):
    """Raised if the store did not answer within the time limit."""


class WithoutRoom(Exception):
    """Raised if the store is at its limit of bytes. The message says what holds them."""


class NotFound(LookupError):
    """Raised if the store does not hold the object."""


class Upload:
    """The file of an upload. It counts how far any attempt has sent it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._furthest, self._advanced = 0, False

    def chunks(self) -> Iterator[bytes]:
        """Yield the file from its start, for one attempt."""
        self._file.seek(0)
        sent = 0
        while chunk := self._file.read(CHUNK):
            yield chunk
            sent += len(chunk)
            if sent > self._furthest:
                self._furthest, self._advanced = sent, True

    def has_advanced(self) -> bool:
        """Return whether bytes were sent for the first time since the last call."""
        advanced, self._advanced = self._advanced, False
        return advanced


class RetryingHttp:
    """Client of one store. Thread-safe."""

    def __init__(
        self,
        url: str,
        *,
        patience_s: float,
        ca_file: Path | None = None,
        sleep: Callable[[float], None] = time.sleep,
        sleep_without_room: Callable[[float], None] | None = None,
        outages: Outages = OUTAGES,
    ) -> None:
        context = tls_context(ca_file, key="snapshot_store.ca_file")  # once, because reading certificates takes 40 ms
        self._http = our_client(base_url=url, verify=context, timeout=timeout_of(0), headers=authorization(os.environ))
        # A presigned URL signs only the Host header, so others may be sent. `identity`: ranges count stored bytes
        self._direct = outside_client(context, timeout=timeout_of(0), headers={"Accept-Encoding": "identity"})
        self._patience_s, self._sleep, self._outages = patience_s, sleep, outages
        self._sleep_without_room = sleep_without_room or sleep
        self.url = url

    def close(self) -> None:
        """Close the connections."""
        self._http.close()
        self._direct.close()

    def call(self, send: Callable[[httpx.Client], httpx.Response], *, upload: Upload | None = None) -> httpx.Response:
        """Return the first reply with a status below 500.

        The time limit counts from the start of the call. With `upload`, the file that `send` sends, it counts from the
        last break before which an attempt came further than all before it: a long upload that breaks is repeated. A
        full disk is no break: how far an attempt comes then depends on buffers.

        Raises StoreUnavailable at the time limit, OSError if the disk of the store stays full, WithoutRoom at once if
        the store is at its limit, and UserError if the store refuses this process.
        """
        retry = _RetryState(self._sleep)
        with self._outages.waiting() as outage:
            while True:
                of, address = STORE, self.url
                try:
                    reply = send(self._http)
                    self._raise_if_unauthorized(reply)
                    if reply.status_code < 500:
                        return reply
                    if (reason := _no_room(reply)) is not None:
                        raise WithoutRoom(reason)
                    error, limit_s = _failure(reply), self._patience_s
                    of, address = _storage_outage(reply) or (of, address)
                except httpx.TransportError as failure:
                    error, limit_s = StoreUnavailable(f"{type(failure).__name__}: {failure}"), self._patience_s
                if upload is not None and not isinstance(error, OSError) and upload.has_advanced():
                    retry = _RetryState(self._sleep)
                if isinstance(error, OSError):
                    limit_s = min(limit_s, FULL_PATIENCE_S)
                outage.record_failure(of, address, str(error), until=self._outages.now() + retry.remaining_s(limit_s))
                if not retry.pause(limit_s):
                    break
        if isinstance(error, OSError):
            raise error
        raise StoreUnavailable(f"the snapshot store at {self.url} did not answer in {limit_s:g} s: {error}")

    def wait_for_room(self, size: int) -> None:
        """Return when the store has room for this many bytes. Raises StoreUnavailable after ROOM_PATIENCE_S."""
        retry = _RetryState(self._sleep_without_room)
        with self._outages.waiting() as outage:
            while True:
                try:
                    raise_for_status(self.call(lambda http: http.get("/v1/quota", params={"bytes": size})), 200)
                    return
                except WithoutRoom as error:
                    until = self._outages.now() + retry.remaining_s(ROOM_PATIENCE_S)
                    outage.record_failure(ROOM, self.url, str(error), until=until)
                    if not retry.pause(ROOM_PATIENCE_S):
                        hours = f"{ROOM_PATIENCE_S / 3600:g} h"
                        raise StoreUnavailable(f"the store at {self.url} had no room for {hours}: {error}") from None

    def body(self, path: str) -> Generator[bytes, None, None]:
        """Iterate over the bytes under `path`. Raises NotFound, StoreUnavailable."""
        with self._outages.waiting() as outage:
            yield from self._body(path, outage)

    def _body(self, path: str, outage: Waiting) -> Generator[bytes, None, None]:
        received, retry = 0, _RetryState(self._sleep)
        while True:
            servers = [(STORE, self.url)]
            try:
                with self._open_stream(path, received, servers) as (reply, start):
                    if reply.status_code == 416:  # no bytes from there on: the reader detects a truncated body
                        return
                    if reply.status_code in (200, 206):
                        position = start
                        # yield each chunk at once, because a broken connection loses buffered ones
                        for chunk in reply.iter_bytes():
                            new, position = chunk[max(0, received - position) :], position + len(chunk)
                            if new:
                                received, retry = received + len(new), _RetryState(self._sleep)
                                outage.record_answer()
                                yield new
                        return
                    reply.read()
                    problem = f"{reply.status_code} {reply.text[:200]}"
                    servers += [storage] if (storage := _storage_outage(reply)) else []
            except httpx.TransportError as error:
                problem = f"{type(error).__name__}: {error}"
            outage.record_failure(
                *servers[-1], problem, until=self._outages.now() + retry.remaining_s(self._patience_s)
            )
            if not retry.pause(self._patience_s):
                raise StoreUnavailable(f"GET {path}: no answer in {self._patience_s:g} s: {problem}")

    @contextmanager
    def _open_stream(
        self, path: str, received: int, servers: list[tuple[str, str]]
    ) -> Iterator[tuple[httpx.Response, int]]:
        """Open the body at byte `received`, from the store or from the URL to which it redirects.

        Yields the reply and the byte at which its body starts. Appends the redirect target to `servers`.
        """
        with self._http.stream("GET", path) as reply:
            if reply.status_code == 404:
                raise NotFound(path)
            self._raise_if_unauthorized(reply)
            if reply.status_code != 307:
                yield reply, 0
                return
            address = reply.headers["Location"]
        servers.append((S3, str(httpx.URL(address).copy_with(raw_path=b"/")).rstrip("/")))
        # if the S3 refuses (expired URL, removed object), the caller asks the store again
        with self._direct.stream("GET", address, headers={"Range": f"bytes={received}-"} if received else {}) as reply:
            yield reply, received if reply.status_code == 206 else 0

    def _raise_if_unauthorized(self, reply: httpx.Response) -> None:
        """Raise UserError for 401 and 403: a retry would fail in the same way."""
        if reply.status_code in (401, 403):
            reply.read()
            raise UserError(
                f"the snapshot store at {self.url} refuses this process ({reply.status_code}: {_message(reply)}): set "
                f"{SERVICE_TOKEN} to a token that the store knows, with the role `service`"
            )


class _RetryState:
    """Growing pauses up to a time limit. The sum of the pauses counts if it exceeds the elapsed time (test clocks)."""

    def __init__(self, sleep: Callable[[float], None]) -> None:
        self._sleep = sleep
        self._began, self._paused, self._next_s = time.monotonic(), 0.0, FIRST_PAUSE_S

    def remaining_s(self, limit_s: float) -> float:
        """Return the seconds until the limit."""
        return limit_s - max(self._paused, time.monotonic() - self._began)

    def pause(self, limit_s: float) -> bool:
        """Pause before another attempt. Returns False without a pause if it would exceed the limit."""
        if self._next_s > self.remaining_s(limit_s):
            return False
        self._sleep(self._next_s)
        self._paused += self._next_s
        self._next_s = min(2 * self._next_s, LONGEST_PAUSE_S)
        return True


def raise_for_status(reply: httpx.Response, *codes: int) -> None:
    """Raise StoreUnavailable if the status is not one of `codes`."""
    if reply.status_code not in codes:
        raise StoreUnavailable(
            f"{reply.request.method} {reply.request.url.path}: {reply.status_code} {reply.text[:300]}"
        )


def _message(reply: httpx.Response) -> str:
    try:
        return str(msgspec.json.decode(reply.content)["message"])
    except (msgspec.DecodeError, KeyError, TypeError):
        return reply.text[:200]


def _storage_outage(reply: httpx.Response) -> tuple[str, str] | None:
    """Return the S3 and its address if the reply says that the S3 behind the store is unreachable, else None."""
    try:
        body = msgspec.json.decode(reply.content)
        return (S3, str(body["address"])) if body["code"] == "storage_unavailable" else None
    except (msgspec.DecodeError, KeyError, TypeError):
        return None


def _no_room(reply: httpx.Response) -> str | None:
    """Return what a reply says about the store's limit of bytes; None for every other reply."""
    try:
        body = msgspec.json.decode(reply.content) if reply.status_code == 507 else {}
        return str(body["message"]) if body["code"] == "quota_reached" else None
    except (msgspec.DecodeError, KeyError, TypeError):
        return None


def _failure(reply: httpx.Response) -> OSError | StoreUnavailable:
    """Return the error of a 5xx reply: an OSError for a full disk of the store, else StoreUnavailable."""
    if reply.status_code == 507:
        body = reply.json()
        return OSError(body["errno"], os.strerror(body["errno"]), body["path"])
    return StoreUnavailable(f"{reply.status_code} {reply.text[:200]}")
