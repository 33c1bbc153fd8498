"""The guard in front of an application: limits of bodies and headers, and the shape of every error."""

import asyncio
from collections.abc import AsyncIterator

import httpx
import pytest
from fastapi import FastAPI, Request
from prometheus_client import CollectorRegistry

from palimpsest.common.control.access import SERVICE_TOKEN
from palimpsest.common.control.credentials import open_access
from palimpsest.common.control.guard import BODY_BYTES, RequestLimits
from palimpsest.common.service import application

REFUSALS = list[str]()


def an_app(*, body_s: float = 60.0) -> FastAPI:
    app = application(
        "thing",
        registry=CollectorRegistry(),
        ready=lambda: None,
        status=dict,
        access=open_access({SERVICE_TOKEN: "right"}),
        body_limits={"/upload": None, "/small": 10},
        limits=RequestLimits(header_bytes=1000, body_s=body_s),
        on_error=REFUSALS.append,
    )

    async def size(request: Request) -> int:
        return len(await request.body())

    for path in ("/upload", "/small", "/usual"):
        app.put(path)(size)

    @app.put("/unread")
    async def unread() -> int:
        return 0

    @app.get("/breaks")
    async def breaks() -> None:
        raise RuntimeError("a secret text")

    return app


def asking(app: FastAPI) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://t", headers={"Authorization": "Bearer right"})


async def pieces(*sizes: int) -> AsyncIterator[bytes]:
    for size in sizes:
        yield b"x" * size


async def never() -> AsyncIterator[bytes]:
    yield b"x"
    await asyncio.Event().wait()


@pytest.mark.parametrize(
    ("path", "limit"), [("/small", 10), ("/usual", BODY_BYTES), ("/unread", BODY_BYTES), ("/nothing", BODY_BYTES)]
)
async def test_a_body_over_the_limit_of_its_route_is_a_413(path: str, limit: int) -> None:
    async with asking(an_app()) as client:
        announced = await client.put(path, content=b"x" * (limit + 1))
        closes = limit == BODY_BYTES  # a small body is read before the reply
        assert (announced.status_code, announced.headers.get("connection")) == (413, "close" if closes else None)
        assert announced.json() == {
            "code": "too_large", "message": f"a body of this route has at most {limit} bytes", "retryable": False
        }  # fmt: skip
        if path not in ("/nothing", "/unread"):
            assert (await client.put(path, content=b"x" * limit)).json() == limit
            in_pieces = await client.put(path, content=pieces(limit, 1))
            assert (in_pieces.status_code, in_pieces.json()["code"]) == (413, "too_large")
            assert in_pieces.headers["connection"] == "close"


async def test_an_upload_has_no_limit() -> None:
    async with asking(an_app()) as client:
        assert (await client.put("/upload", content=pieces(BODY_BYTES, BODY_BYTES))).json() == 2 * BODY_BYTES


@pytest.mark.parametrize("path", ["/usual", "/upload"])
async def test_a_body_that_stops_arriving_is_a_408_that_closes_the_connection(path: str) -> None:
    async with asking(an_app(body_s=0.01)) as client:
        reply = await client.put(path, content=never())
    assert (reply.status_code, reply.json()["code"], reply.json()["retryable"]) == (408, "too_slow", True)
    assert reply.headers["connection"] == "close"


async def test_a_long_body_that_is_not_read_closes_the_connection() -> None:
    async with asking(an_app()) as client:
        assert (await client.put("/unread", content=pieces(1))).headers["connection"] == "close"
        assert "connection" not in (await client.put("/unread", content=b"x")).headers  # it is read before the reply
        assert "connection" not in (await client.put("/unread")).headers
        assert "connection" not in (await client.put("/usual", content=b"x")).headers


async def test_headers_over_the_limit_are_a_431() -> None:
    async with asking(an_app()) as client:
        reply = await client.get("/v1/status", headers={"X": "x" * 1000})
    assert (reply.status_code, reply.json()["code"]) == (431, "headers_too_large")


@pytest.mark.parametrize(
    ("method", "path", "token", "status", "code"),
    [
        ("GET", "/v1/status", "wrong", 401, "unauthorized"),
        ("GET", "/nothing", "right", 404, "unknown_route"),
        ("GET", "/healthz/", "right", 404, "unknown_route"),
        ("PUT", "/v1/status", "right", 405, "wrong_method"),
        ("OPTIONS", "/v1/status", "right", 405, "wrong_method"),
        ("GET", "/breaks", "right", 500, "internal"),
    ],
)
async def test_every_error_has_the_same_shape(method: str, path: str, token: str, status: int, code: str) -> None:
    REFUSALS.clear()
    async with asking(an_app()) as client:
        headers = {"Authorization": f"Bearer {token}", "Origin": "http://evil.example"}
        reply = await client.request(method, path, headers=headers)
    assert (reply.status_code, reply.json()["code"]) == (status, code)
    assert set(reply.json()) == {"code", "message", "retryable"}
    assert "secret" not in reply.text
    assert not any(name.startswith("access-control") for name in reply.headers)
    assert ([code] if status < 500 else []) == REFUSALS
