"""A run file, for the tests of the configuration."""

from pathlib import Path

import pytest

from tests.unit.common.config_files import RUN


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run file that sets only keys without a default."""
    path = tmp_path / "run.toml"
    path.write_text(RUN)
    return path
