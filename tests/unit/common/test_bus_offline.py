"""Opening a log offline creates nothing. tests/contract/test_bus_offline.py tests reads."""

from pathlib import Path

import pytest

from palimpsest.common.bus.factory import open_bus
from palimpsest.common.bus.offline import open_existing_bus
from palimpsest.common.bus.sqlite import SqliteBus
from palimpsest.common.config import load
from palimpsest.common.config.schema import RunConfig
from palimpsest.common.user_error import UserError

RUN = 'run.id = "test"\nmodel.path = "m"\ntasks.environments = { lookup = 1.0 }\nlearner.versions = 3\n'


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    path = tmp_path / "run.toml"
    path.write_text(RUN)
    return load([str(path), f"--run.folder={tmp_path}"], {}, program="").config


def test_a_missing_log_is_refused_and_not_created(config: RunConfig) -> None:
    with pytest.raises(UserError, match="no such log"):
        open_existing_bus(config)
    assert not config.bus_path.exists()
    SqliteBus(config.bus_path).close()
    with pytest.raises(UserError, match="run test has no log"):
        open_existing_bus(config)
    open_bus(config).close()
    open_existing_bus(config).close()
