"""Fixtures of the contract suites."""

import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import closing
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import pytest

from palimpsest.common.bus.port import Bus
from palimpsest.common.service import Server
from palimpsest.services.snapshot_store.app import create_app
from palimpsest.services.snapshot_store.storage_disk import DiskStorage
from tests.contract.logs import PARTITIONS, TOPIC, KafkaLog, Log, MemoryLog, Spawn, SqliteLog


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrize `log` over the adapters, unless the test names its own. Tests that spawn processes skip the log in
    memory."""
    named = {mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")}
    if "log" in metafunc.fixturenames and "log" not in named:
        logs = ["sqlite", *([] if "spawn" in metafunc.fixturenames else ["memory"])]
        kafka = pytest.param("kafka", marks=pytest.mark.servers)
        metafunc.parametrize("log", [*logs, kafka], indirect=True)


@pytest.fixture
def log(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Log]:
    """A log with one topic of four partitions."""
    made: Log
    if request.param == "sqlite":
        made = SqliteLog(tmp_path / "bus.sqlite")
        _make_topic(made)
        yield made
    elif request.param == "memory":
        made = MemoryLog()
        _make_topic(made)
        yield made
    else:
        kafka = request.getfixturevalue("kafka_server")
        app = create_app(DiskStorage(tmp_path / "store"), sweep_s=3600)
        with Server(app, "127.0.0.1", 0, key="snapshot_store") as store:
            made = KafkaLog(kafka.servers, f"http://127.0.0.1:{store.port}")
            _make_topic(made)
            yield made


def _make_topic(log: Log) -> None:
    with closing(log.open()) as bus:
        bus.create_topics({TOPIC: PARTITIONS})


@pytest.fixture
def bus(log: Log) -> Iterator[Bus]:
    """An open bus on the log."""
    with closing(log.open()) as opened:
        yield opened


@pytest.fixture
def spawn() -> Iterator[Spawn]:
    """Run a function in a separate process with a pipe to it. The fixture kills the process after the test."""
    context, started = multiprocessing.get_context("spawn"), list[SpawnProcess]()

    def spawn(target: Callable[..., None], *arguments: Any) -> tuple[SpawnProcess, Connection]:
        ours, theirs = context.Pipe()
        process = context.Process(target=target, args=(*arguments, theirs), daemon=True)
        process.start()
        theirs.close()  # so that the pipe closes when the process dies
        started.append(process)
        return process, ours

    yield spawn
    for process in started:
        process.kill()
        process.join()
