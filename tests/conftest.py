"""Fixtures that many tests share. A backend that is missing is a failure, never a skip."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: processes side by side share the cores

from palimpsest.common.outages import OUTAGES
from tests.pytest_hooks import failure_report
from tests.pytest_hooks.failure_report import pytest_runtest_makereport, pytest_runtest_setup
from tests.pytest_hooks.groups import pytest_collection_finish, pytest_collection_modifyitems
from tests.servers.shared_servers import shared
from tools.backends.kafka import Kafka
from tools.backends.minio import Minio

__all__ = [
    "pytest_collection_finish",
    "pytest_collection_modifyitems",
    "pytest_runtest_makereport",
    "pytest_runtest_setup",
]
WORKER = "PYTEST_XDIST_WORKER" in os.environ
SESSION = os.getppid() if WORKER else os.getpid()
"""The process that ends with the session: pytest's, and not that of one of its workers."""


settings.register_profile("palimpsest", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("few", settings.get_profile("palimpsest"), max_examples=15)  # of `make check`
settings.load_profile("palimpsest")  # the same examples every time, however slow the machine is


def pytest_addoption(parser: pytest.Parser) -> None:
    """Flags of our own."""
    parser.addoption("--faults", default="", help="integration/test_cluster_faults.py: only these, as killed,paused")


@pytest.fixture(scope="session", autouse=True)
def _logs_are_found(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Where a failed test's logs are."""
    folder = _shared(tmp_path_factory)
    failure_report.folders[:] = [tmp_path_factory.getbasetemp(), folder / "kafka", folder / "minio"]


@pytest.fixture(autouse=True)
def _no_outage_of_another_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test begins with an empty register of outages: a client that another test left behind may still be in it."""
    monkeypatch.setattr(OUTAGES, "_entries", {})


@pytest.fixture(scope="session")
def starting_model() -> Path:
    """The starting model, tied as the real small Qwen3 are."""
    from tests.learner_parts.models import (
        build,  # here, because it imports torch: four seconds that most single tests do without
    )

    return build(tied=True)


@pytest.fixture(scope="session")
def untied_model() -> Path:
    """The same with an output head of its own."""
    from tests.learner_parts.models import build

    return build(tied=False)


@pytest.fixture(scope="session")
def kafka_server(tmp_path_factory: pytest.TempPathFactory) -> Kafka:
    """The Kafka of this test session. No test stops, kills or pauses it. First use may install it."""
    server = shared("kafka", _shared(tmp_path_factory), SESSION)
    assert isinstance(server, Kafka)
    return server


@pytest.fixture(scope="session")
def minio_server(tmp_path_factory: pytest.TempPathFactory) -> Minio:
    """The MinIO of this test session. No test stops, kills or pauses it. First use may build it."""
    server = shared("minio", _shared(tmp_path_factory), SESSION)
    assert isinstance(server, Minio)
    return server


@pytest.fixture(scope="module")
def own_kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kafka]:
    """A Kafka of the file's own, which its tests may stop, kill and pause."""
    with Kafka(tmp_path_factory.mktemp("own-kafka")) as kafka:
        yield kafka


@pytest.fixture(scope="module")
def own_minio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Minio]:
    """A MinIO of the file's own, which its tests may stop, kill and pause."""
    with Minio(tmp_path_factory.mktemp("own-minio")) as minio:
        yield minio


def _shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all processes of this test session."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if WORKER else own
