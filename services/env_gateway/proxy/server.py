"""Serves listening sockets of sessions as HTTP proxies: CONNECT, and requests of http with a whole URL.

Every connection is checked by its own host and port, so neither a redirect nor a URL that a model wrote leads anywhere
else. The proxy sees names and ports, not what a tunnel carries. It runs in a thread of its own, because it also serves
while the gateway checks its environments before its event loop runs.
"""

import asyncio
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from http import HTTPStatus

from palimpsest.services.env_gateway.instruments import HOSTS_REFUSED
from palimpsest.services.env_gateway.proxy.addresses import PermittedHosts, read_head, split

HEAD_LIMIT_S, CONNECT_LIMIT_S = 30.0, 30.0
MAX_HEAD, CHUNK = 65536, 65536
CONNECTIONS = 64
"""Connections of one session at once: each has two sockets in the gateway."""


class HostProxy:
    """The proxies of all sessions."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._served: set[ServedSocket] = set()

    def serve(self, listening: socket.socket, permitted: PermittedHosts) -> "ServedSocket":
        """Serve this socket until `close` of the result."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(
                target=_run, args=(self._loop, self._served), name="host proxy", daemon=True
            )
            self._thread.start()
        served = ServedSocket(self._loop, permitted, ended=self._served.discard)
        self._served.add(served)
        asyncio.run_coroutine_threadsafe(served.begin(listening), self._loop).result()
        return served

    def stop(self) -> None:
        """End all connections and the thread. Idempotent."""
        if self._loop is not None and self._thread is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop = self._thread = None


def _run(loop: asyncio.AbstractEventLoop, served: set["ServedSocket"]) -> None:
    """Run the loop until it is stopped, then end what it still serves."""
    loop.run_forever()
    for one in tuple(served):
        one.end()
    if tasks := asyncio.all_tasks(loop):
        for task in tasks:
            task.cancel()
        loop.run_until_complete(asyncio.wait(tasks))
    loop.close()


class ServedSocket:
    """The proxy of one session."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        permitted: PermittedHosts,
        *,
        ended: Callable[["ServedSocket"], None],
    ) -> None:
        self._loop, self._permitted, self._ended = loop, permitted, ended
        self._connections: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def begin(self, listening: socket.socket) -> None:
        """Accept connections from now on."""
        self._server = await asyncio.start_server(self._accept, sock=listening, limit=MAX_HEAD)

    def close(self) -> None:
        """End all connections. Thread-safe, idempotent."""
        with suppress(RuntimeError):  # the loop is closed, and with it every connection
            self._loop.call_soon_threadsafe(self.end)

    def end(self) -> None:
        """End all connections, in the thread of the loop. Idempotent."""
        self._ended(self)
        if self._server is not None:
            self._server.close()
        for connection in self._connections:
            connection.cancel()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            with suppress(OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.CancelledError):
                await self._answer(reader, writer)
        finally:
            self._connections.discard(task)
            if task.cancelling():
                writer.transport.abort()
            else:
                writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one connection."""
        if len(self._connections) > CONNECTIONS:
            return await _refuse(writer, HTTPStatus.SERVICE_UNAVAILABLE, f"more than {CONNECTIONS} connections")
        try:
            async with asyncio.timeout(HEAD_LIMIT_S):
                head = read_head(await reader.readuntil(b"\r\n\r\n"))
        except (ValueError, asyncio.LimitOverrunError) as error:
            return await _refuse(writer, HTTPStatus.BAD_REQUEST, f"the proxy of the gateway: {error}")
        if head.address not in self._permitted.addresses:
            HOSTS_REFUSED.labels(self._permitted.environment).inc()
            return await _refuse(
                writer,
                HTTPStatus.FORBIDDEN,
                f"env_gateway.child_hosts.{self._permitted.environment} does not name {head.address}; it names "
                f"{', '.join(self._permitted.addresses)}",
            )
        if (problem := head.contradiction()) is not None:
            return await _refuse(writer, HTTPStatus.BAD_REQUEST, f"the proxy of the gateway: {problem}")
        try:
            async with asyncio.timeout(CONNECT_LIMIT_S):
                from_server, to_server = await asyncio.open_connection(*split(head.address))
        except (OSError, TimeoutError) as error:
            reason = str(error) or f"no answer in {CONNECT_LIMIT_S:g} s"
            return await _refuse(writer, HTTPStatus.BAD_GATEWAY, f"{head.address} cannot be reached: {reason}")
        if head.forward is None:
            writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        else:
            to_server.write(head.forward)
        upload = asyncio.create_task(_copy(reader, to_server))
        try:
            await _copy(from_server, writer)
            if head.forward is None:  # either side of a tunnel may end first
                await upload
        finally:
            upload.cancel()
            to_server.transport.abort()
        return None


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Copy bytes until the end of the reader."""
    with suppress(OSError):
        while chunk := await reader.read(CHUNK):
            writer.write(chunk)
            await writer.drain()
        writer.write_eof()


async def _refuse(writer: asyncio.StreamWriter, status: HTTPStatus, text: str) -> None:
    body = f"{text}\n".encode()
    head = f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: text/plain; charset=utf-8\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
    await writer.drain()
