"""Fixtures that many tests share. A backend that is missing is a failure, never a skip."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: processes side by side share the cores

from tests.models import build
from tools.backends.kafka import Kafka
from tools.backends.minio import Minio


@pytest.fixture(scope="session")
def starting_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The starting model, tied as the real small Qwen3 are."""
    return build(_shared(tmp_path_factory), tied=True)


@pytest.fixture(scope="session")
def untied_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with an output head of its own."""
    return build(_shared(tmp_path_factory), tied=False)


@pytest.fixture(scope="session")
def kafka_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kafka]:
    """A Kafka for this test session; one that a test stops or kills, it starts again. First use may install it."""
    with Kafka(tmp_path_factory.mktemp("kafka")) as kafka:
        yield kafka


@pytest.fixture(scope="session")
def minio_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Minio]:
    """A MinIO for this test session; one that a test stops or kills, it starts again. First use may build it."""
    with Minio(tmp_path_factory.mktemp("minio")) as minio:
        yield minio


def _shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all processes of this test session."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
