"""Fixtures for many tests. A missing backend is a failure, never a skip."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: concurrent processes share the cores

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in background jobs of a shell; children inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

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
"""Pid of the main pytest process, also in the workers of pytest-xdist."""


settings.register_profile("palimpsest", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("few", settings.get_profile("palimpsest"), max_examples=15)  # for `make check`
settings.load_profile("palimpsest")  # the same examples on every machine


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the project's flags."""
    parser.addoption("--faults", default="", help="integration/test_cluster_faults.py: only these, as killed,paused")


@pytest.fixture(scope="session", autouse=True)
def _logs_are_found(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Set the folders in which the report of a failed test looks for logs."""
    folder = _shared(tmp_path_factory)
    failure_report.folders[:] = [tmp_path_factory.getbasetemp(), folder / "kafka", folder / "minio"]


@pytest.fixture(autouse=True)
def _no_outage_of_another_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give each test an empty register of outages; clients of earlier tests may still be registered."""
    monkeypatch.setattr(OUTAGES, "_entries", {})


@pytest.fixture(scope="session")
def starting_model() -> Path:
    """The starting model, with tied embeddings like the real small Qwen3 models."""
    from tests.learner_parts.models import (
        build,  # here, because it imports torch for four seconds, and most tests do not need it
    )

    return build(tied=True)


@pytest.fixture(scope="session")
def untied_model() -> Path:
    """The starting model with an untied output head."""
    from tests.learner_parts.models import build

    return build(tied=False)


@pytest.fixture(scope="session")
def kafka_server(tmp_path_factory: pytest.TempPathFactory) -> Kafka:
    """Kafka of this test session. Tests must not stop, kill or pause it. The first use may install it."""
    server = shared("kafka", _shared(tmp_path_factory), SESSION)
    assert isinstance(server, Kafka)
    return server


@pytest.fixture(scope="session")
def minio_server(tmp_path_factory: pytest.TempPathFactory) -> Minio:
    """MinIO of this test session. Tests must not stop, kill or pause it. The first use may build it."""
    server = shared("minio", _shared(tmp_path_factory), SESSION)
    assert isinstance(server, Minio)
    return server


@pytest.fixture(scope="module")
def own_kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kafka]:
    """A Kafka of one test file, which its tests may stop, kill and pause."""
    with Kafka(tmp_path_factory.mktemp("own-kafka")) as kafka:
        yield kafka


@pytest.fixture(scope="module")
def own_minio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Minio]:
    """A MinIO of one test file, which its tests may stop, kill and pause."""
    with Minio(tmp_path_factory.mktemp("own-minio")) as minio:
        yield minio


def _shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Temporary folder that all processes of this test session share."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if WORKER else own
