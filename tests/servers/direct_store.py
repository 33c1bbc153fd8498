"""A snapshot store without a socket: requests are answered by the application in the thread that asks.

For tests that ask thousands of times, and for those in which nothing may happen at the same time.
"""

import asyncio
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from palimpsest.common.snapshots.client import SnapshotClient
from palimpsest.services.snapshot_store import storage_disk
from palimpsest.services.snapshot_store.app import create_app
from palimpsest.services.snapshot_store.storage_disk import DiskStorage

NEVER_S = 1e9
URL = "http://store"


class Direct(httpx.BaseTransport):
    """Runs the application for each request; one at a time."""

    def __init__(self, app: FastAPI, loop: asyncio.AbstractEventLoop) -> None:
        self._app, self._loop = app, loop

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """See httpx."""
        body = b"".join(request.stream)  # type: ignore[arg-type]
        status, headers, parts = 500, list[tuple[bytes, bytes]](), list[bytes]()
        scope = {
            "type": "http", "http_version": "1.1", "method": request.method, "scheme": "http", "server": ("store", 80),
            "path": request.url.path, "raw_path": request.url.raw_path.partition(b"?")[0], "root_path": "",
            "query_string": request.url.query,
            "headers": [(name.lower(), value) for name, value in request.headers.raw],
        }  # fmt: skip
        asked = False

        async def receive() -> dict[str, Any]:
            nonlocal asked
            if asked:
                return {"type": "http.disconnect"}
            asked = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: MutableMapping[str, Any]) -> None:
            nonlocal status, headers
            if message["type"] == "http.response.start":
                status, headers = message["status"], list(message["headers"])
            else:
                parts.append(message.get("body", b""))

        self._loop.run_until_complete(self._app(scope, receive, send))
        return httpx.Response(status, headers=headers, content=b"".join(parts))


class DirectStore:
    """Over a folder; it never sweeps."""

    def __init__(self, folder: Path, loop: asyncio.AbstractEventLoop) -> None:
        self._loop, self._app = loop, create_app(DiskStorage(folder), sweep_s=NEVER_S)

    def connect(self, client: SnapshotClient) -> None:
        """Have this client, which was made for `URL`, ask here. Not in a thread whose event loop runs."""
        client._calls._http.close()
        client._calls._http = httpx.Client(transport=Direct(self._app, self._loop), base_url=URL)

    @contextmanager
    def open(self) -> Iterator[None]:
        """It answers inside."""
        context = self._app.router.lifespan_context(self._app)
        self._loop.run_until_complete(context.__aenter__())
        try:
            yield
        finally:
            self._loop.run_until_complete(context.__aexit__(None, None, None))


@contextmanager
def direct_store(folder: Path) -> Iterator[DirectStore]:
    """One that answers; what it writes is not synced, for the machine does not fail."""

    async def at_once(call: Any, *arguments: Any) -> Any:
        return call(*arguments)

    loop = asyncio.new_event_loop()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda _: None)
        patch.setattr(storage_disk, "asyncio", SimpleNamespace(to_thread=at_once))
        store = DirectStore(folder, loop)
        with store.open():
            yield store
    loop.close()
