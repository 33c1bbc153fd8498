"""Polling services that answer, hang, or do not exist; following a history and the worker topic."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import msgspec
import pytest

from palimpsest.common.bus.port import Outgoing
from palimpsest.common.bus.sqlite import SqliteBus
from palimpsest.common.messages import DEAD_LETTERS, WORKERS, VersionApplied, decode, encode
from palimpsest.common.rejected_record import RejectCause
from palimpsest.common.versions import Version
from palimpsest.services.live import poller
from palimpsest.services.live.poller import RunPoller, ServiceObservation
from tests.processes.waiting import LIMIT_S, until
from tests.records.history_lines import a_line


class Answering(ThreadingHTTPServer):
    """A service that returns its status, unless it hangs."""

    daemon_threads = True
    hangs, asked, released = threading.Event(), threading.Event(), threading.Event()
    token: str | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _StatusRequest(BaseHTTPRequestHandler):
    server: Answering

    def do_GET(self) -> None:
        if self.server.hangs.is_set():
            self.server.asked.set()
            self.server.released.wait()
        self.server.token = self.headers["Authorization"]
        body = b'{"waiting_for": null, "version": 3}' if self.path == "/v1/status" else b""
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def service() -> Iterator[Answering]:
    server = Answering(("127.0.0.1", 0), _StatusRequest)
    server.hangs, server.asked, server.released = threading.Event(), threading.Event(), threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def bus(tmp_path: Path) -> Iterator[SqliteBus]:
    bus = SqliteBus(tmp_path / "bus.sqlite")
    bus.create_topics({WORKERS: 1, DEAD_LETTERS: 1})
    yield bus
    bus.close()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(poller, "EVERY_S", 0.02)
    monkeypatch.setattr(poller, "TIMEOUT_S", 0.2)


def test_a_service_that_hangs_keeps_its_last_answer(service: Answering, bus: SqliteBus, tmp_path: Path):
    urls = {"learner": service.url, "worker-0": service.url}
    with RunPoller(urls, tmp_path, bus, run="test", token="secret") as watching:
        until(lambda: watching.observe().services["learner"].earlier is not None)
        assert service.token == "Bearer secret"
        service.hangs.set()
        until(lambda: watching.observe().services["learner"].trouble == "ReadTimeout")
        observed = watching.observe().services["learner"]
        assert observed.last is not None
        assert observed.last.status == {"waiting_for": None, "version": 3}


def test_an_observer_does_not_wait_for_a_service(
    service: Answering, bus: SqliteBus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(poller, "TIMEOUT_S", 60 * LIMIT_S)
    service.hangs.set()
    with RunPoller({"learner": service.url}, tmp_path, bus, run="test") as watching:
        assert service.asked.wait(LIMIT_S)
        observing = threading.Thread(target=watching.observe, daemon=True)
        observing.start()
        observing.join(LIMIT_S)
        service.released.set()
        assert not observing.is_alive()


def test_a_service_that_never_answered_is_unknown(bus: SqliteBus, tmp_path: Path):
    with RunPoller({"learner": "http://127.0.0.1:9"}, tmp_path, bus, run="test") as watching:
        until(lambda: watching.observe().services["learner"] == ServiceObservation(trouble="ConnectError"))


def test_history_and_updates_are_followed(bus: SqliteBus, tmp_path: Path):
    update = VersionApplied("t", "worker-0", Version(1), "", True, 0.01, 0.2, 3)
    with RunPoller({}, tmp_path, bus, run="test") as watching:
        assert watching.observe().trained.versions == 0
        bus.publish(WORKERS, [Outgoing("worker-0", encode(update)), Outgoing("worker-0", b"not a record")])
        (tmp_path / "history.jsonl").write_bytes(msgspec.json.encode(a_line(0)) + b"\n")
        until(lambda: watching.observe().applied == (update,))
        until(lambda: watching.observe().trained.versions == 1)
        assert watching.observe().trained.last == a_line(0)
    with bus.consumer(DEAD_LETTERS) as letters:
        (record,) = letters.poll(limit=9, timeout_s=0)
    letter = decode(DEAD_LETTERS, record.body)
    assert (letter.run, letter.topic, letter.offset, letter.body) == ("test", WORKERS, 1, b"not a record")
    assert letter.cause is RejectCause.UNDECODABLE
