"""Opening a log offline creates nothing. tests/contract/test_bus_offline.py tests reads."""

from contextlib import closing
from pathlib import Path

import pytest

from palimpsest.common.bus.factory import open_bus
from palimpsest.common.bus.offline import open_existing_bus, read_existing
from palimpsest.common.bus.port import Outgoing
from palimpsest.common.bus.sqlite import SqliteBus
from palimpsest.common.config import load
from palimpsest.common.config.schema import RunConfig
from palimpsest.common.messages import TOPICS
from palimpsest.common.user_error import ExitCode, UserError

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


def test_a_damaged_log_is_refused_and_not_changed(config: RunConfig) -> None:
    with closing(open_bus(config)) as bus:
        for topic in TOPICS:
            bus.publish(topic, [Outgoing(str(key), bytes(1000)) for key in range(100)])
    whole = config.bus_path.read_bytes()
    page = 4096
    for damaged in (
        b"",
        b"?",
        b"no log" * 999,
        whole[:page],
        whole[: len(whole) // 2],
        whole[:-page],
        _overwritten(whole),
    ):
        config.bus_path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"the log is damaged: .*\. Restore the file from a copy") as error:
            _read_all(config)
        assert error.value.code is ExitCode.DAMAGED
        assert config.bus_path.read_bytes() == damaged


def _read_all(config: RunConfig) -> None:
    with closing(open_existing_bus(config)) as bus:
        for topic in TOPICS:
            list(read_existing(bus, topic))


def _overwritten(body: bytes) -> bytes:
    """Return the log with other bytes in its pages, but with its first four."""
    kept = 4 * 4096
    return body[:kept] + b"\xff" * (len(body) - kept)
