"""The client's way to a body that the store sends it to fetch elsewhere: followed, resumed, asked for anew."""

import asyncio
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from fastapi import FastAPI, Request, Response
from fastapi.responses import RedirectResponse, StreamingResponse

from palimpsest.common.service import Server
from palimpsest.common.snapshots.retrying_http import NotFound, RetryingHttp, StoreUnavailable
from tests.processes.waiting import LIMIT_S

BODY = bytes(range(256)) * 12_000
BROKEN_AT = 1_000_000


class Elsewhere:
    """A store whose reads are redirected, and the place they are redirected to, in one server.

    `plan` says what that place does with its requests, one word each; afterwards it serves. The body stands whole.
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


def fetched(elsewhere: Elsewhere, *, patience_s: float = 120.0) -> tuple[bytes, list[float]]:
    pauses: list[float] = []
    with Server(elsewhere.app, "127.0.0.1", 0, key="t") as server:
        calls = RetryingHttp(f"http://127.0.0.1:{server.port}", patience_s=patience_s, sleep=pauses.append)
        try:
            return b"".join(calls.body("/v1/objects/a")), pauses
        finally:
            calls.close()


def test_a_body_comes_from_where_the_store_points_without_headers_that_a_signature_would_miss() -> None:
    elsewhere = Elsewhere([])
    assert fetched(elsewhere) == (BODY, [])
    assert elsewhere.headers[0].keys() <= {"host", "accept", "accept-encoding", "connection", "user-agent"}
    assert elsewhere.headers[0]["accept-encoding"] == "identity"


def test_a_connection_that_breaks_is_taken_up_where_it_broke_by_a_new_address() -> None:
    elsewhere = Elsewhere(["breaks", "breaks"])
    assert fetched(elsewhere) == (BODY, [0.2, 0.2])
    assert elsewhere.ranges == [None, f"bytes={BROKEN_AT}-", f"bytes={2 * BROKEN_AT}-"]
    assert elsewhere.asked == 3


def test_a_place_that_knows_no_ranges_sends_the_body_again_and_what_was_had_is_passed_over() -> None:
    assert fetched(Elsewhere(["breaks", "no ranges"])) == (BODY, [0.2])


@pytest.mark.parametrize("trouble", ["expired", "busy", "gone"])
def test_an_address_that_is_refused_is_asked_for_again(trouble: str) -> None:
    elsewhere = Elsewhere([trouble, "breaks", trouble])
    assert fetched(elsewhere) == (BODY, [0.2, 0.2, 0.4])
    assert elsewhere.asked == 4


def test_addresses_that_are_always_refused_end_in_a_sentence() -> None:
    with pytest.raises(StoreUnavailable, match=r"^GET /v1/objects/a: no answer in 3 s: 403 <Code>AccessDenied</Code>$"):
        fetched(Elsewhere(["expired"] * 100), patience_s=3.0)


def test_a_body_that_became_shorter_ends_early_for_the_reader_to_notice() -> None:
    body, _ = fetched(Elsewhere(["breaks", "beyond"]))
    assert body == BODY[:BROKEN_AT]


def test_what_is_nowhere_is_not_there() -> None:
    with Server(FastAPI(), "127.0.0.1", 0, key="t") as server:
        calls = RetryingHttp(f"http://127.0.0.1:{server.port}", patience_s=1.0)
        with pytest.raises(NotFound):
            next(calls.body("/v1/objects/a"))
        calls.close()


@pytest.mark.thorough
def test_many_threads_share_one_client() -> None:
    elsewhere, together = Elsewhere([]), threading.Barrier(8)
    elsewhere.app.put("/v1/echo")(echo)
    with Server(elsewhere.app, "127.0.0.1", 0, key="t") as server:
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
    """The request's body."""
    return Response(await request.body())
