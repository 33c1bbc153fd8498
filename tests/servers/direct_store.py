"""A snapshot store without a socket: the application answers requests in the thread of the client.

For tests with thousands of requests, and for tests that allow no concurrency.
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


class InProcessTransport(httpx.BaseTransport):
    """Transport that runs the application for each request, one at a time."""

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
        sent = False

        async def receive() -> dict[str, Any]:
            nonlocal sent
            if sent:
                return {"type": "http.disconnect"}
            sent = True
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
    """Snapshot store over a folder, without sweeps."""

    def __init__(self, folder: Path, loop: asyncio.AbstractEventLoop) -> None:
        self._loop, self._app = loop, create_app(DiskStorage(folder), sweep_s=NEVER_S)

    def connect(self, client: SnapshotClient) -> None:
        """Connect a client of `URL` to this store. Must not be called in a thread with a running event loop."""
        client._calls._http.close()
        client._calls._http = httpx.Client(transport=InProcessTransport(self._app, self._loop), base_url=URL)

    @contextmanager
    def open(self) -> Iterator[None]:
        """Run the application's lifespan; the store answers inside the block."""
        context = self._app.router.lifespan_context(self._app)
        self._loop.run_until_complete(context.__aenter__())
        try:
            yield
        finally:
            self._loop.run_until_complete(context.__aexit__(None, None, None))


@contextmanager
def direct_store(folder: Path) -> Iterator[DirectStore]:
    """Open a store that does not sync its writes, since the tests simulate no machine failure."""

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
