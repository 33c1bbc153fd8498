"""HTTP server and stop handling of every service: health, readiness, metrics, status.

    GET /healthz     200 while the process runs
    GET /readyz      200 when the service could do its work now, even if it has none; else 503 with the reason
    GET /metrics     Prometheus metrics
    GET /v1/status   one JSON object: state of the service, `waiting_for`, and unreachable services (`outages`)

The guard (common/control) is in front of every route. A service that needs no token listens on loopback only.

SIGTERM and SIGINT request a clean stop (`Stop`). A second signal ends the process at once.
"""

import asyncio
import errno
import os
import signal
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from types import FrameType, TracebackType
from typing import Any, Self

import uvicorn
from fastapi import APIRouter, FastAPI, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from palimpsest.common.control.access import Access, AccessRule, require_token_off_loopback
from palimpsest.common.control.connections import limited_protocol
from palimpsest.common.control.error_replies import COMMON_ERRORS, answer_errors_alike, documented
from palimpsest.common.control.guard import LIMITS, RequestGuard, RequestLimits
from palimpsest.common.control.openapi import describe
from palimpsest.common.logs import logger
from palimpsest.common.outages import OUTAGES, Outages
from palimpsest.common.user_error import ExitCode, UserError

Status = dict[str, Any]
GRACE_S = 10
"""Time for open HTTP requests to finish when a server stops, in seconds."""


class Stop:
    """Stop request of the process, an event. Install it once, in the main thread."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._callbacks: list[Callable[[], None]] = []
        self._signaled = False
        self.code = ExitCode.DONE
        """Exit code for the stop that was requested first."""
        self.last_words = ""
        """Text for stdout when a second signal ends the process at once."""

    def install(self) -> Self:
        """Handle SIGTERM and SIGINT."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        return self

    def request(self, code: ExitCode = ExitCode.DONE) -> None:
        """Request the stop from inside the process. code: exit code, if no stop was requested before."""
        if not self.requested:
            self.code = code
        self._event.set()
        for callback in self._callbacks:
            callback()

    def on_request(self, callback: Callable[[], None]) -> None:
        """Register a callback for the stop request; call it now if the stop is already requested.

        The signal handler or the requesting thread runs the callback.
        """
        self._callbacks.append(callback)
        if self.requested:
            callback()

    @property
    def requested(self) -> bool:
        """Whether the stop is requested."""
        return self._event.is_set()

    def wait(self, timeout_s: float) -> bool:
        """Wait up to `timeout_s` seconds for the stop. Returns whether it is requested."""
        return self._event.wait(timeout_s)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self._signaled:
            with suppress(OSError):  # the terminal may be closed
                os.write(1, self.last_words.encode())
            os._exit(128 + number)
        self._signaled = True
        self.request(ExitCode.INTERRUPTED)


def application(
    service: str,
    *,
    registry: CollectorRegistry,
    ready: Callable[[], str | None],
    status: Callable[[], Status],
    waiting_for: Callable[[], str | None] | None = None,
    outages: Outages = OUTAGES,
    access: Access | None = None,
    rules: Sequence[AccessRule] = (),
    body_limits: Mapping[str, int | None] | None = None,
    limits: RequestLimits = LIMITS,
    on_error: Callable[[str], None] = lambda _: None,
    **options: Any,
) -> FastAPI:
    """Return a FastAPI app with the four common routes behind the guard. Another thread calls the functions.

    ready: returns None if the service could do its work now, else the reason.
    waiting_for: returns what the service waits for, or None; without it, the result of `ready`. A service that waits
        for work is ready: an orchestrator must not take it for broken.
    access, rules, body_limits: see guard.py. on_error: called with the code of each error reply.
    """
    current_wait = waiting_for or ready
    app = FastAPI(
        title=f"Palimpsest {service}",
        docs_url="/docs",
        redoc_url=None,
        redirect_slashes=False,
        responses=documented(*COMMON_ERRORS),
        **options,
    )
    app.state.access = access
    app.add_middleware(
        RequestGuard, access=access, rules=rules, body_limits=body_limits or {}, limits=limits, on_refusal=on_error
    )
    answer_errors_alike(app, on_error)
    describe(app, access, rules)

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"service": service}

    @app.get("/readyz", responses={503: {"model": dict[str, Any], "description": "Not ready"}})
    async def readyz() -> JSONResponse:
        waiting = ready()
        return JSONResponse({"ready": waiting is None, "waiting_for": waiting}, 200 if waiting is None else 503)

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/status")
    async def current_status() -> Status:
        return {"service": service, "waiting_for": current_wait(), "outages": outages.ongoing(), **status()}

    return app


class Server:
    """An HTTP server on a thread. It listens inside the block `with Server(...):`.

    Raises UserError if other machines could reach an application that needs no token.
    """

    def __init__(self, app: FastAPI, host: str, port: int, *, key: str, limits: RequestLimits = LIMITS) -> None:
        require_token_off_loopback(host, _access(app), key=key)
        self._socket = listen(host, port, key=key)
        self.port: int = self._socket.getsockname()[1]
        self.app = app
        """The application that answers requests."""
        self._server = _Uvicorn(self._answer, limits)
        self._thread = threading.Thread(target=self._run, name="http", daemon=True)

    def show(self, app: FastAPI) -> None:
        """Replace the application that answers requests."""
        self.app = app

    async def _answer(self, scope: Any, receive: Any, send: Any) -> None:
        await self.app(scope, receive, send)

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
    """A server for the start of a service. Its readiness reports `doing`, the current activity.

    Any thread may set `doing`. `show_service` replaces this application with that of the service.
    """

    def __init__(
        self,
        service: str,
        host: str,
        port: int,
        *,
        key: str,
        registry: CollectorRegistry,
        access: Access | None = None,
    ) -> None:
        self.doing = "its libraries to load"
        self._application = partial(application, service, registry=registry, access=access)
        app = self._application(ready=lambda: self.doing, status=lambda: {"starting": True})
        super().__init__(app, host, port, key=key)

    def show_service(
        self,
        *,
        ready: Callable[[], str | None],
        status: Callable[[], Status],
        waiting_for: Callable[[], str | None] | None = None,
        routes: APIRouter | None = None,
        rules: Sequence[AccessRule] = (),
    ) -> None:
        """Answer with the state of the service from now on; the access rules stay.

        routes: further routes. Other arguments: see `application`.
        """
        app = self._application(ready=ready, status=status, waiting_for=waiting_for, rules=rules)
        if routes is not None:
            app.include_router(routes)
        self.show(app)


def serve(app: FastAPI, host: str, port: int, *, key: str, stop: Stop) -> None:
    """Serve in this thread until `stop`, then wait for open requests.

    Raises UserError if other machines could reach an application that needs no token.
    """
    require_token_off_loopback(host, _access(app), key=key)
    listening = listen(host, port, key=key)
    server = _Uvicorn(app, LIMITS)

    def leave() -> None:
        server.should_exit = True

    stop.on_request(leave)
    logger().info("listening", address=f"http://{host}:{listening.getsockname()[1]}")
    server.run(sockets=[listening])


async def serve_sockets(app: FastAPI, listening: socket.socket, *, max_bytes: int, stop: Stop) -> None:
    """Serve HTTP and WebSockets on this loop until `stop`. max_bytes: of a message.

    The headers have uvicorn's limits: the connection that limits them in time would end a WebSocket too.
    """
    server = _Uvicorn(app, LIMITS, http="auto", ws="auto", ws_max_size=max_bytes)

    def leave() -> None:
        server.should_exit = True

    stop.on_request(leave)
    await server.serve(sockets=[listening])


def listen(host: str, port: int, *, key: str) -> socket.socket:
    """Return a listening socket. Raises UserError, which names the key to change, if it cannot listen there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # asyncio sets TCP_NODELAY on TCP alone
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen(2048)
    except OSError as error:
        listening.close()
        if error.errno == errno.EADDRINUSE:
            raise UserError(
                f"port {port} on {host} is in use: stop the program that uses it (`ss -ltnp`), or choose "
                f"another port with --{key}.port=PORT (0 = any free port, with `palimpsest run`)",
                ExitCode.UNAVAILABLE,
            ) from None
        raise UserError(f"cannot listen on {host}:{port} ({key}.host, {key}.port): {error}") from None
    listening.set_inheritable(False)
    return listening


def _access(app: FastAPI) -> Access | None:
    """Return the access rules of an application of `application`; None for any other."""
    found = getattr(app.state, "access", None)
    return found if isinstance(found, Access) else None


class _Uvicorn(uvicorn.Server):
    """uvicorn without its signal handlers, because `Stop` handles signals."""

    def __init__(self, app: Any, limits: RequestLimits, **others: Any) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                interface="asgi3",
                **{"http": limited_protocol(limits), "ws": "none", **others},
                log_config=None,
                access_log=False,
                lifespan="on",
                timeout_graceful_shutdown=GRACE_S,
                timeout_keep_alive=int(limits.keep_alive_s),
            )
        )

    def capture_signals(self) -> Any:
        return nullcontext()
