"""Downloads that the store redirects: redirects are followed, broken downloads resume, and addresses are renewed."""

import asyncio
import io
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import httpx
import pytest
from fastapi import FastAPI, Request, Response
from fastapi.responses import RedirectResponse, StreamingResponse

from palimpsest.common.service import Server
from palimpsest.common.snapshots import retrying_http
from palimpsest.common.snapshots.retrying_http import CHUNK, NotFound, RetryingHttp, StoreUnavailable, Upload
from tests.processes.waiting import LIMIT_S

BODY = bytes(range(256)) * 12_000
BROKEN_AT = 1_000_000


class RedirectingStore:
    """A store that redirects reads, and the redirect target, in one server.

    `plan` has one word per request to the target; after the plan, the target serves the complete body.
    """

    def __init__(self, plan: list[str]) -> None:
        self.plan, self.asked = list(plan), 0
        self.ranges: list[str | None] = []
        self.headers: list[dict[str, str]] = []
        self.app = FastAPI()
        self.app.get("/v1/objects/a")(self.store)
        self.app.get("/elsewhere")(self.place)

    async def store(self, request: Request) -> Response:
        self.asked += 1
        address = request.url.replace(path="/elsewhere", query=f"X-Amz-Signature=a%2Fb%20c&n={self.asked}")
        return RedirectResponse(str(address), 307)

    async def place(self, request: Request) -> Response:
        wanted = request.headers.get("range")
        self.ranges.append(wanted)
        self.headers.append(dict(request.headers))
        assert request.url.query == f"X-Amz-Signature=a%2Fb%20c&n={self.asked}", "a signature holds for these letters"
        match self.plan.pop(0) if self.plan else "serve":
            case "breaks":
                return StreamingResponse(self._breaking(_start(wanted)), 206 if wanted else 200)
            case "expired":
                return Response("<Code>AccessDenied</Code>", 403)
            case "busy":
                return Response("<Code>SlowDown</Code>", 503)
            case "gone":
                return Response("<Code>NoSuchKey</Code>", 404)
            case "no ranges":
                return Response(BODY, 200)
            case "beyond":
                return Response(status_code=416)
        return Response(BODY[_start(wanted) :], 206 if wanted else 200)

    @staticmethod
    async def _breaking(start: int) -> AsyncIterator[bytes]:
        yield BODY[start : start + BROKEN_AT]
        raise asyncio.CancelledError  # uvicorn drops the connection


def _start(wanted: str | None) -> int:
    return int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0


def fetched(store: RedirectingStore, *, patience_s: float = 120.0) -> tuple[bytes, list[float]]:
    pauses: list[float] = []
    with Server(store.app, "127.0.0.1", 0, key="t") as server:
        calls = RetryingHttp(f"http://127.0.0.1:{server.port}", patience_s=patience_s, sleep=pauses.append)
        try:
            return b"".join(calls.body("/v1/objects/a")), pauses
        finally:
            calls.close()


def test_a_redirect_is_followed_without_headers_that_the_signature_does_not_cover() -> None:
    store = RedirectingStore([])
    assert fetched(store) == (BODY, [])
    assert store.headers[0].keys() <= {"host", "accept", "accept-encoding", "connection", "user-agent"}
    assert store.headers[0]["accept-encoding"] == "identity"


def test_a_broken_download_resumes_at_its_offset_with_a_new_address() -> None:
    store = RedirectingStore(["breaks", "breaks"])
    assert fetched(store) == (BODY, [0.2, 0.2])
    assert store.ranges == [None, f"bytes={BROKEN_AT}-", f"bytes={2 * BROKEN_AT}-"]
    assert store.asked == 3


def test_a_target_without_ranges_sends_the_body_again_and_received_bytes_are_skipped() -> None:
    assert fetched(RedirectingStore(["breaks", "no ranges"])) == (BODY, [0.2])


@pytest.mark.parametrize("trouble", ["expired", "busy", "gone"])
def test_a_refused_address_is_requested_again(trouble: str) -> None:
    store = RedirectingStore([trouble, "breaks", trouble])
    assert fetched(store) == (BODY, [0.2, 0.2, 0.4])
    assert store.asked == 4


def test_addresses_that_are_always_refused_end_in_an_error() -> None:
    with pytest.raises(StoreUnavailable, match=r"^GET /v1/objects/a: no answer in 3 s: 403 <Code>AccessDenied</Code>$"):
        fetched(RedirectingStore(["expired"] * 100), patience_s=3.0)


def test_a_body_that_became_shorter_ends_early() -> None:
    body, _ = fetched(RedirectingStore(["breaks", "beyond"]))
    assert body == BODY[:BROKEN_AT]


def test_a_missing_body_is_reported_as_missing() -> None:
    with Server(FastAPI(), "127.0.0.1", 0, key="t") as server:
        calls = RetryingHttp(f"http://127.0.0.1:{server.port}", patience_s=1.0)
        with pytest.raises(NotFound):
            next(calls.body("/v1/objects/a"))
        calls.close()


@pytest.mark.parametrize(("breaks", "attempts"), [([2, 3], 3), ([2, 3, 3, 5], 3), ([], 1)])
def test_an_upload_longer_than_the_patience_is_repeated_while_it_comes_further(
    monkeypatch: pytest.MonkeyPatch, breaks: list[int], attempts: int
) -> None:
    """Patience 10 s, 60 s for each of 4 chunks. The attempts break after these chunks; the next one sends the file."""
    now, sent, left = [0.0], 0, list(breaks)
    monkeypatch.setattr(retrying_http, "time", SimpleNamespace(monotonic=lambda: now[0]))
    upload = Upload(io.BytesIO(bytes(4 * CHUNK)))

    def send(_: httpx.Client) -> httpx.Response:
        nonlocal sent
        sent += 1
        stop = left.pop(0) if left else None
        for number, _chunk in enumerate(upload.chunks()):
            if number == stop:
                raise httpx.WriteError("broken")
            now[0] += 60.0
        return httpx.Response(201)

    calls = RetryingHttp("http://store", patience_s=10.0, sleep=lambda _: None)
    if len(breaks) == 4:  # the third attempt comes no further than the second
        with pytest.raises(StoreUnavailable):
            calls.call(send, upload=upload)
    else:
        assert calls.call(send, upload=upload).status_code == 201
    calls.close()
    assert sent == attempts


@pytest.mark.thorough
def test_many_threads_share_one_client() -> None:
    store, together = RedirectingStore([]), threading.Barrier(8)
    store.app.put("/v1/echo")(echo)
    with Server(store.app, "127.0.0.1", 0, key="t") as server:
        calls = RetryingHttp(f"http://127.0.0.1:{server.port}", patience_s=60.0)

        def work(number: int) -> list[bytes]:
            together.wait(LIMIT_S)
            sent = [b"%d.%d" % (number, i) * 1000 for i in range(20)]
            return [
                reply
                for body in sent
                if (reply := calls.call(lambda http, body=body: http.put("/v1/echo", content=body)).content) != body
            ]

        with ThreadPoolExecutor(8) as threads:
            assert list(threads.map(work, range(8))) == [[]] * 8
        calls.close()


async def echo(request: Request) -> Response:
    """Return the request's body."""
    return Response(await request.body())
