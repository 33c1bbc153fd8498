"""Fixtures that many tests share. A backend that is missing is a failure, never a skip."""

import os
from pathlib import Path

import pytest

from tests.models import build


@pytest.fixture(scope="session")
def starting_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The starting model, tied as the real small Qwen3 are."""
    return build(_shared(tmp_path_factory), tied=True)


@pytest.fixture(scope="session")
def untied_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with an output head of its own."""
    return build(_shared(tmp_path_factory), tied=False)


def _shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all processes of this test session."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
