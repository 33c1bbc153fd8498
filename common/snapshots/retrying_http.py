"""HTTP with the snapshot store that outlasts an outage: tried again until a stated time is used up.

A body may come from the store or, where the store answers 307, from the S3 behind it, by an address that holds for a
while. Either way a connection that breaks is taken up where it broke: what stands in the store never changes.
"""

import os
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import msgspec

from palimpsest.common.outages import OUTAGES, S3, STORE, Outages, Waiting
from palimpsest.common.tls import tls_context

FIRST_PAUSE_S = 0.2
"""Before the second try; doubles, up to LONGEST_PAUSE_S."""
LONGEST_PAUSE_S = 5.0
FULL_PATIENCE_S = 20.0
"""A full disk is waited for no longer than this: room may be made meanwhile, but somebody has to hear of it."""
_TIMEOUT = httpx.Timeout(60.0, connect=5.0)


class StoreUnavailable(Exception):
    """The store did not answer in the time allowed."""


class NotFound(LookupError):
    """The store does not hold this."""


class RetryingHttp:
    """Requests to one store. Any number of threads may use it at once."""

    def __init__(
        self,
        url: str,
        *,
        patience_s: float,
        ca_file: Path | None = None,
        sleep: Callable[[float], None] = time.sleep,
        outages: Outages = OUTAGES,
    ) -> None:
        trusted = tls_context(ca_file, key="snapshot_store.ca_file")  # once: to read certificates takes 40 ms
        self._http = httpx.Client(base_url=url, verify=trusted, timeout=_TIMEOUT)
        # no header but Host is signed in a presigned address; identity, so that a range counts stored bytes
        self._direct = httpx.Client(verify=trusted, timeout=_TIMEOUT, headers={"Accept-Encoding": "identity"})
        self._patience_s, self._sleep, self._outages = patience_s, sleep, outages
        self.url = url

    def close(self) -> None:
        """Drop the connections."""
        self._http.close()
        self._direct.close()

    def call(self, send: Callable[[httpx.Client], httpx.Response]) -> httpx.Response:
        """The first reply that is no fault of the server (below 500).

        Raises StoreUnavailable, and OSError when the disk of the store stays full.
        """
        waiting = _RetryState(self._sleep)
        with self._outages.waiting() as outage:
            while True:
                of, address = STORE, self.url
                try:
                    reply = send(self._http)
                    if reply.status_code < 500:
                        return reply
                    error, limit_s = _failure(reply), self._patience_s
                    of, address = _storage_outage(reply) or (of, address)
                except httpx.TransportError as broken:
                    error, limit_s = StoreUnavailable(f"{type(broken).__name__}: {broken}"), self._patience_s
                if isinstance(error, OSError):
                    limit_s = min(limit_s, FULL_PATIENCE_S)
                outage.record_failure(of, address, str(error), until=self._outages.now() + waiting.remaining_s(limit_s))
                if not waiting.pause(limit_s):
                    break
        if isinstance(error, OSError):
            raise error
        raise StoreUnavailable(f"the snapshot store at {self.url} did not answer in {limit_s:g} s: {error}")

    def body(self, path: str) -> Generator[bytes, None, None]:
        """The bytes under `path`, in pieces. Raises NotFound, StoreUnavailable."""
        with self._outages.waiting() as outage:
            yield from self._body(path, outage)

    def _body(self, path: str, outage: Waiting) -> Generator[bytes, None, None]:
        had, waiting = 0, _RetryState(self._sleep)
        while True:
            asked = [(STORE, self.url)]
            try:
                with self._open_stream(path, had, asked) as (reply, start):
                    if reply.status_code == 416:  # nothing from there on: whoever reads sees what is lacking
                        return
                    if reply.status_code in (200, 206):
                        at = start
                        # as it comes: what were held back would be lost with the connection
                        for chunk in reply.iter_bytes():
                            new, at = chunk[max(0, had - at) :], at + len(chunk)
                            if new:
                                had, waiting = had + len(new), _RetryState(self._sleep)
                                outage.record_answer()
                                yield new
                        return
                    reply.read()
                    problem = f"{reply.status_code} {reply.text[:200]}"
                    asked += [away] if (away := _storage_outage(reply)) else []
            except httpx.TransportError as error:
                problem = f"{type(error).__name__}: {error}"
            outage.record_failure(
                *asked[-1], problem, until=self._outages.now() + waiting.remaining_s(self._patience_s)
            )
            if not waiting.pause(self._patience_s):
                raise StoreUnavailable(f"GET {path}: no answer in {self._patience_s:g} s: {problem}")

    @contextmanager
    def _open_stream(self, path: str, had: int, asked: list[tuple[str, str]]) -> Iterator[tuple[httpx.Response, int]]:
        """The reply, from the store or from where it points, and at which byte its body begins.

        Whom it asks besides the store is appended to `asked`.
        """
        with self._http.stream("GET", path) as reply:
            if reply.status_code == 404:
                raise NotFound(path)
            if reply.status_code != 307:
                yield reply, 0
                return
            address = reply.headers["Location"]
        asked.append((S3, str(httpx.URL(address).copy_with(raw_path=b"/")).rstrip("/")))
        # what is refused there (the address expired, the object just went) is asked of the store again
        with self._direct.stream("GET", address, headers={"Range": f"bytes={had}-"} if had else {}) as reply:
            yield reply, had if reply.status_code == 206 else 0


class _RetryState:
    """Pauses that grow, until a time is used up; pauses count even where the clock stands still."""

    def __init__(self, sleep: Callable[[float], None]) -> None:
        self._sleep = sleep
        self._began, self._paused, self._next_s = time.monotonic(), 0.0, FIRST_PAUSE_S

    def remaining_s(self, limit_s: float) -> float:
        """Seconds until the limit."""
        return limit_s - max(self._paused, time.monotonic() - self._began)

    def pause(self, limit_s: float) -> bool:
        """Pause before another try; False when that would go beyond the limit."""
        if self._next_s > self.remaining_s(limit_s):
            return False
        self._sleep(self._next_s)
        self._paused += self._next_s
        self._next_s = min(2 * self._next_s, LONGEST_PAUSE_S)
        return True


def raise_for_status(reply: httpx.Response, *codes: int) -> None:
    """Raises StoreUnavailable for any other status."""
    if reply.status_code not in codes:
        raise StoreUnavailable(
            f"{reply.request.method} {reply.request.url.path}: {reply.status_code} {reply.text[:300]}"
        )


def _storage_outage(reply: httpx.Response) -> tuple[str, str] | None:
    """The S3 behind the store, where the store says that it does not answer."""
    try:
        said = msgspec.json.decode(reply.content)
        return (S3, str(said["address"])) if said["code"] == "storage_unavailable" else None
    except (msgspec.DecodeError, KeyError, TypeError):
        return None


def _failure(reply: httpx.Response) -> OSError | StoreUnavailable:
    """What a 5xx says: a full disk of the store is a full disk here, too."""
    if reply.status_code == 507:
        said = reply.json()
        return OSError(said["errno"], os.strerror(said["errno"]), said["path"])
    return StoreUnavailable(f"{reply.status_code} {reply.text[:200]}")
