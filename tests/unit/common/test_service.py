"""Common parts of services: listening, health checks, and stopping."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator

import httpx
import pytest
from fastapi import FastAPI
from prometheus_client import CollectorRegistry, Counter

from palimpsest.common.control.errors import HttpError
from palimpsest.common.service import Server, Starting, Status, Stop, application, listen
from palimpsest.common.user_error import ExitCode, UserError
from tests.processes.waiting import LIMIT_S

HOST = "127.0.0.1"


@pytest.fixture
def taken() -> Iterator[int]:
    """A port in use by another program."""
    with socket.socket() as holder:
        holder.bind((HOST, 0))
        holder.listen()
        yield holder.getsockname()[1]


class Work:
    """A service's state."""

    def __init__(self) -> None:
        self.waits_for: str | None = "the first version"

    def status(self) -> Status:
        return {"live": 3}


def an_app(work: Work) -> FastAPI:
    registry = CollectorRegistry()
    Counter("things", "Things", registry=registry).inc(4)
    app = application("thing", registry=registry, ready=lambda: work.waits_for, status=work.status)

    @app.get("/refuses")
    async def refuses() -> None:
        raise HttpError(429, "too_many", "come later", retryable=True, limit=2)

    @app.get("/conflict")
    async def conflict() -> None:
        raise HttpError(409, "conflict", "taken")

    return app


def asking(app: FastAPI) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://thing")


async def test_a_service_is_healthy_before_it_is_ready() -> None:
    async with asking(an_app(Work())) as client:
        reply = await client.get("/healthz")
    assert (reply.status_code, reply.json()) == (200, {"service": "thing"})


async def test_a_waiting_service_answers_503_with_the_reason() -> None:
    async with asking(an_app(Work())) as client:
        reply = await client.get("/readyz")
    assert (reply.status_code, reply.json()) == (503, {"ready": False, "waiting_for": "the first version"})


async def test_a_working_service_answers_200() -> None:
    work = Work()
    work.waits_for = None
    async with asking(an_app(work)) as client:
        reply = await client.get("/readyz")
    assert (reply.status_code, reply.json()) == (200, {"ready": True, "waiting_for": None})


async def test_a_service_that_waits_for_work_is_ready() -> None:
    app = application(
        "thing", registry=CollectorRegistry(), ready=lambda: None, status=dict, waiting_for=lambda: "tasks"
    )
    async with asking(app) as client:
        assert (await client.get("/readyz")).json() == {"ready": True, "waiting_for": None}
        assert (await client.get("/v1/status")).json()["waiting_for"] == "tasks"


async def test_the_status_has_the_service_its_wait_and_its_work() -> None:
    async with asking(an_app(Work())) as client:
        reply = await client.get("/v1/status")
    assert reply.json() == {"service": "thing", "waiting_for": "the first version", "outages": [], "live": 3}


async def test_the_metrics_are_those_of_the_registry() -> None:
    async with asking(an_app(Work())) as client:
        reply = await client.get("/metrics")
    assert "things_total 4.0" in reply.text.splitlines()
    assert reply.headers["content-type"].startswith("text/plain")


async def test_an_error_is_answered_with_its_code_message_and_retry_time() -> None:
    async with asking(an_app(Work())) as client:
        reply = await client.get("/refuses")
    assert (reply.status_code, reply.headers["retry-after"]) == (429, "1")
    assert reply.json() == {"code": "too_many", "message": "come later", "retryable": True, "limit": 2}


async def test_a_permanent_error_has_no_retry_time() -> None:
    async with asking(an_app(Work())) as client:
        reply = await client.get("/conflict")
    assert "retry-after" not in reply.headers
    assert reply.json()["retryable"] is False


def test_a_port_in_use_is_refused_with_the_key_to_change(taken: int) -> None:
    with pytest.raises(UserError) as error:
        Server(an_app(Work()), HOST, taken, key="env_gateway")
    assert error.value.code is ExitCode.UNAVAILABLE
    assert int(error.value.code) == 3
    assert f"port {taken} on {HOST} is in use" in str(error.value)
    assert "--env_gateway.port=PORT" in str(error.value)


def test_an_address_of_another_machine_is_refused_with_its_keys() -> None:
    with pytest.raises(UserError, match=r"cannot listen on 203\.0\.113\.7:0 \(thing\.host, thing\.port\)"):
        listen("203.0.113.7", 0, key="thing")


def test_port_0_is_any_free_port() -> None:
    with listen(HOST, 0, key="thing") as one, listen(HOST, 0, key="thing") as other:
        assert 0 < one.getsockname()[1] != other.getsockname()[1] > 0


async def test_small_writes_of_a_connection_leave_at_once() -> None:
    """With Nagle's algorithm, the second of two small writes waits 40 ms for a delayed acknowledgment."""
    found: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def connected(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        found.set_result(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        writer.close()

    listening = listen(HOST, 0, key="thing")
    async with await asyncio.start_server(connected, sock=listening):
        _, writer = await asyncio.open_connection(*listening.getsockname())
        assert await found
        writer.close()


def test_a_server_answers_inside_its_block_only() -> None:
    with Server(an_app(Work()), HOST, 0, key="thing") as server:
        url = f"http://{HOST}:{server.port}/healthz"
        assert httpx.get(url).json() == {"service": "thing"}
    with pytest.raises(httpx.ConnectError):
        httpx.get(url)


def test_a_starting_service_reports_its_phase() -> None:
    with Starting("thing", HOST, 0, key="thing", registry=CollectorRegistry()) as server:
        url = f"http://{HOST}:{server.port}"
        server.doing = "the model to be loaded"
        assert httpx.get(f"{url}/v1/status").json() == {
            "service": "thing", "waiting_for": "the model to be loaded", "outages": [], "starting": True
        }  # fmt: skip
        assert httpx.get(f"{url}/readyz").status_code == 503
        assert httpx.get(f"{url}/healthz").status_code == 200
        server.show(an_app(Work()))
        assert httpx.get(f"{url}/v1/status").json()["live"] == 3


def test_a_released_port_can_be_used_again() -> None:
    with Server(an_app(Work()), HOST, 0, key="thing") as first:
        httpx.get(f"http://{HOST}:{first.port}/healthz")
    with Server(an_app(Work()), HOST, first.port, key="thing") as second:
        assert httpx.get(f"http://{HOST}:{second.port}/healthz").status_code == 200


def test_a_stop_wakes_its_waiters() -> None:
    stop, woken = Stop(), threading.Event()
    waiter = threading.Thread(target=lambda: stop.wait(LIMIT_S) and woken.set())
    waiter.start()
    assert (stop.requested, stop.wait(0)) == (False, False)
    stop.request()
    waiter.join(LIMIT_S)
    assert woken.is_set()
    assert (stop.requested, stop.wait(0)) == (True, True)


def test_a_stop_calls_every_callback() -> None:
    stop, calls = Stop(), list[str]()
    stop.on_request(lambda: calls.append("first"))
    stop.on_request(lambda: calls.append("second"))
    assert calls == []
    stop.request()
    assert calls == ["first", "second"]


def test_a_callback_added_after_the_stop_is_called_at_once() -> None:
    """A SIGTERM while a service is still starting must not be lost."""
    stop, calls = Stop(), list[str]()
    stop.request()
    stop.on_request(lambda: calls.append("late"))
    assert calls == ["late"]


@pytest.fixture
def signals() -> Iterator[None]:
    """Restore the signal handlers of this process."""
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.usefixtures("signals")
def test_a_signal_requests_a_clean_stop(number: signal.Signals) -> None:
    stop, calls = Stop().install(), list[str]()
    stop.on_request(lambda: calls.append("stopped"))
    os.kill(os.getpid(), number)
    assert stop.wait(LIMIT_S)
    assert calls == ["stopped"]


@pytest.mark.usefixtures("signals")
def test_after_an_internal_stop_the_first_signal_requests_a_clean_stop() -> None:
    stop, calls = Stop().install(), list[str]()
    stop.request()
    stop.on_request(lambda: calls.append("stopped"))
    os.kill(os.getpid(), signal.SIGTERM)
    assert calls == ["stopped", "stopped"]


def test_a_second_signal_ends_the_process_at_once() -> None:
    never_done = (
        "from palimpsest.common.service import Stop\n"
        "stop = Stop().install()\n"
        "stop.last_words = 'continue with this\\n'\n"
        "print('listening', flush=True)\n"
        f"stop.wait({LIMIT_S})\n"
        "print('stopping', flush=True)\n"
        "input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", never_done], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "listening\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "stopping\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=LIMIT_S) == 128 + signal.SIGTERM
        assert process.stdout.read() == "continue with this\n"
