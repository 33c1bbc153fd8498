"""The skeleton every service shares: start, serve, drain, stop; health, readiness, metrics and status over HTTP.

    GET /healthz     200 while the process turns over
    GET /readyz      200 when it can do its work, else 503 with the reason
    GET /metrics     Prometheus
    GET /v1/status   one JSON object: what it does, what it waits for, and what it cannot reach (`outages`)

SIGTERM and SIGINT ask for a clean stop (`Stop`); a second one ends the process at once.
"""

import asyncio
import errno
import os
import signal
import socket
import threading
from collections.abc import Callable
from contextlib import nullcontext, suppress
from types import FrameType, TracebackType
from typing import Any, Self

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from palimpsest.common.logs import logger
from palimpsest.common.outages import OUTAGES, Outages
from palimpsest.common.user_error import ExitCode, UserError

Status = dict[str, Any]
GRACE_S = 10
"""Open HTTP requests get so long to finish when a server stops."""


class Stop:
    """Becomes set when the process is asked to stop. Install once, in the main thread."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._callbacks: list[Callable[[], None]] = []
        self._signaled = False
        self.last_words = ""
        """Text for stdout when a second signal ends the process at once."""

    def install(self) -> Self:
        """Listen for SIGTERM and SIGINT."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        return self

    def request(self) -> None:
        """Ask for the stop from inside."""
        self._event.set()
        for callback in self._callbacks:
            callback()

    def on_request(self, callback: Callable[[], None]) -> None:
        """Call this, from the signal handler or the requesting thread, when the stop is asked for; now if it was."""
        self._callbacks.append(callback)
        if self.requested:
            callback()

    @property
    def requested(self) -> bool:
        """Whether the stop has been asked for."""
        return self._event.is_set()

    @property
    def signaled(self) -> bool:
        """Whether a signal asked for it."""
        return self._signaled

    def wait(self, timeout_s: float) -> bool:
        """Wait for the stop, at most so long; whether it came."""
        return self._event.wait(timeout_s)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self._signaled:
            with suppress(OSError):  # the terminal may be closed
                os.write(1, self.last_words.encode())
            os._exit(128 + number)
        self._signaled = True
        self.request()


class HttpError(Exception):
    """An answer other than success: a code a program can act on and a sentence for a person."""

    def __init__(self, status: int, code: str, message: str, *, retryable: bool = False, **extra: Any) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {"Retry-After": "1"} if status in (429, 503) else {}
        self.body = {"code": code, "message": message, "retryable": retryable, **extra}


def application(
    service: str,
    *,
    registry: CollectorRegistry,
    ready: Callable[[], str | None],
    status: Callable[[], Status],
    outages: Outages = OUTAGES,
    **options: Any,
) -> FastAPI:
    """A FastAPI app with the four common routes. `ready` gives None, or what is not ready yet."""
    app = FastAPI(title=f"Palimpsest {service}", docs_url="/docs", redoc_url=None, **options)

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"service": service}

    @app.get("/readyz")
    async def readyz() -> JSONResponse:
        waiting = ready()
        return JSONResponse({"ready": waiting is None, "waiting_for": waiting}, 200 if waiting is None else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/status")
    async def current_status() -> Status:
        return {"service": service, "waiting_for": ready(), "outages": outages.ongoing(), **status()}

    @app.exception_handler(HttpError)
    async def answer(_request: Request, error: HttpError) -> JSONResponse:
        return JSONResponse(error.body, error.status, error.headers)

    return app


class Server:
    """An HTTP server on its own thread: `with Server(...):` listens inside and is gone afterwards."""

    def __init__(self, app: FastAPI, host: str, port: int, *, key: str) -> None:
        self._socket = listen(host, port, key=key)
        self.port: int = self._socket.getsockname()[1]
        self._app = app
        self._server = _Uvicorn(self._answer)
        self._thread = threading.Thread(target=self._run, name="http", daemon=True)

    def show(self, app: FastAPI) -> None:
        """Answer by this application from now on."""
        self._app = app

    async def _answer(self, scope: Any, receive: Any, send: Any) -> None:
        await self._app(scope, receive, send)

    def _run(self) -> None:
        asyncio.run(self._server.serve(sockets=[self._socket]))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.should_exit = True
        self._thread.join(GRACE_S + 5)


class Starting(Server):
    """A server for the time before a service can say more: its status is what it does at the moment.

    `doing` may be set from any thread; `show` ends this.
    """

    def __init__(self, service: str, host: str, port: int, *, key: str, registry: CollectorRegistry) -> None:
        self.doing = "its libraries to load"
        app = application(service, registry=registry, ready=lambda: self.doing, status=lambda: {"starting": True})
        super().__init__(app, host, port, key=key)


def serve(app: FastAPI, host: str, port: int, *, key: str, stop: Stop) -> None:
    """Serve in this thread until `stop`, then let open requests finish."""
    listening = listen(host, port, key=key)
    server = _Uvicorn(app)

    def leave() -> None:
        server.should_exit = True

    stop.on_request(leave)
    logger().info("listening", address=f"http://{host}:{listening.getsockname()[1]}")
    server.run(sockets=[listening])


def listen(host: str, port: int, *, key: str) -> socket.socket:
    """A listening socket; UserError names the key to change when the port is taken."""
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen(2048)
    except OSError as error:
        listening.close()
        if error.errno == errno.EADDRINUSE:
            raise UserError(
                f"port {port} on {host} is in use: stop the program that holds it (`ss -ltnp`), or choose "
                f"another with --{key}.port=PORT (0 = any free one, under `palimpsest run`)",
                ExitCode.UNAVAILABLE,
            ) from None
        raise UserError(f"cannot listen on {host}:{port} ({key}.host, {key}.port): {error}") from None
    listening.set_inheritable(False)
    return listening


class _Uvicorn(uvicorn.Server):
    """uvicorn without its signal handlers: `Stop` has them."""

    def __init__(self, app: Any) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                interface="asgi3",
                log_config=None,
                access_log=False,
                lifespan="on",
                timeout_graceful_shutdown=GRACE_S,
                timeout_keep_alive=75,
            )
        )

    def capture_signals(self) -> Any:
        return nullcontext()
