"""A log with version 0 announced, for the tests of the coordinator."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.learner_parts.interruption import (
    Log,
)


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Log]:
    log = Log(tmp_path)
    log.announced(0)
    yield log
    log.close()
