"""Outages of the store and the gateway: clients record the beginning and the end."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from palimpsest.common.bus.sqlite import SqliteBus
from palimpsest.common.control.errors import HttpError
from palimpsest.common.messages import WORKERS
from palimpsest.common.outages import GATEWAY, OUTAGES, S3, STORE
from palimpsest.common.service import Server, application
from palimpsest.common.sessions.client import SessionClient
from palimpsest.common.snapshots.client import SnapshotClient
from palimpsest.services.live.poller import RunPoller
from tests.processes.waiting import LIMIT_S, until
from tools.backends.ports import free

pytestmark = pytest.mark.thorough

HOST = "127.0.0.1"


def service(name: str) -> FastAPI:
    return application(name, registry=CollectorRegistry(), ready=lambda: None, status=dict)


def a_store(*, storage_away: bool = False) -> FastAPI:
    app = service("snapshot_store")

    @app.get("/v1/versions")
    async def versions() -> dict[str, list[int]]:
        if storage_away:
            raise HttpError(503, "storage_unavailable", "http://s3:1: no answer", address="http://s3:1")
        return {"versions": []}

    return app


@contextmanager
def calling(call: Callable[[], object]) -> Iterator[None]:
    """Run `call` on a separate thread, and assert that it returns after the block."""
    ended: list[object] = []
    thread = threading.Thread(target=lambda: ended.append(call()), daemon=True)
    thread.start()
    yield
    thread.join(LIMIT_S)
    assert len(ended) == 1


def entries(*addresses: str) -> list[tuple[str, str]]:
    """Ongoing outages of these addresses; the register of the process may hold outages of other tests."""
    return [(outage["of"], outage["address"]) for outage in OUTAGES.ongoing() if outage["address"] in addresses]


def test_an_outage_of_the_store_is_recorded_until_its_end() -> None:
    port = free()
    url = f"http://{HOST}:{port}"
    with SnapshotClient(url) as client:
        with Server(a_store(), HOST, port, key="snapshot_store"):
            assert client.versions() == []
            assert entries(url) == []
        with calling(client.versions):
            until(lambda: entries(url) == [(STORE, url)])
            (outage,) = [each for each in OUTAGES.ongoing() if each["address"] == url]
            assert outage["since"] < time.time() < outage["until"]
            with Server(a_store(), HOST, port, key="snapshot_store"):
                until(lambda: entries(url) == [])


def test_an_outage_of_the_s3_storage_names_the_s3() -> None:
    port = free()
    url, s3 = f"http://{HOST}:{port}", "http://s3:1"
    with SnapshotClient(url) as client:
        with Server(a_store(storage_away=True), HOST, port, key="snapshot_store"):
            waits = calling(client.versions)
            waits.__enter__()
            until(lambda: entries(url, s3) == [(S3, s3)])
        until(lambda: entries(url, s3) == [(STORE, url)])
        with Server(a_store(), HOST, port, key="snapshot_store"):
            waits.__exit__(None, None, None)
    assert entries(url, s3) == []


def test_an_outage_of_the_gateway_is_recorded_until_its_end() -> None:
    port = free()
    url = f"http://{HOST}:{port}"

    def a_gateway() -> FastAPI:
        app = service("env_gateway")

        @app.delete("/v1/sessions/s")
        async def close() -> None:
            pass

        return app

    async def close() -> None:
        async with SessionClient(url, timeout_s=LIMIT_S, connections=2) as client:
            await client.close("s")

    with calling(lambda: asyncio.run(close())):
        until(lambda: entries(url) == [(GATEWAY, url)])
        with Server(a_gateway(), HOST, port, key="env_gateway"):
            until(lambda: entries(url) == [])


def test_a_status_lists_the_outages_of_its_process() -> None:
    with Server(service("learner"), HOST, 0, key="learner") as server, OUTAGES.waiting() as call:
        call.record_failure(S3, "http://s3:1", "no answer", until=9e9)
        listed = httpx.get(f"http://{HOST}:{server.port}/v1/status").json()["outages"]
        (own,) = [each for each in OUTAGES.ongoing() if each["address"] == "http://s3:1"]
        assert own in listed
        assert (own["of"], own["until"]) == (S3, 9e9)


def test_the_view_shows_an_outage_of_a_service_and_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("palimpsest.services.live.poller.EVERY_S", 0.05)
    address = "http://s3:2"
    bus = SqliteBus(tmp_path / "bus.sqlite")
    bus.create_topics({WORKERS: 1})
    with Server(service("learner"), HOST, 0, key="learner") as server:
        urls = {"learner": f"http://{HOST}:{server.port}"}
        with RunPoller(urls, tmp_path, bus, run="t") as watching:

            def current() -> list[tuple[str, ...]]:
                return [outage.waiting for outage in watching.observe().outages if outage.address == address]

            def over() -> list[str]:
                return [past.of for past in watching.observe().past if past.address == address]

            with OUTAGES.waiting() as call:
                call.record_failure(S3, address, "no answer", since=time.time() - 60.0)
                until(lambda: current() == [("learner",)])
            until(lambda: over() == [S3])
            assert current() == []
    bus.close()
