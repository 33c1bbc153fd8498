"""The log level of a service that reads no topic changes over REST, with a token that may change settings."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from palimpsest.common import logs, run_folder
from palimpsest.common.config.settings import LOG_LEVEL
from palimpsest.common.control.access import OPERATOR_TOKEN, Access, Role, Token, digest
from palimpsest.common.service import Server
from palimpsest.common.user_error import UserError
from palimpsest.control_command import command
from palimpsest.services.snapshot_store.app import create_app
from palimpsest.services.snapshot_store.storage_disk import DiskStorage


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of a run whose store answers. The level of this process is restored."""
    tokens = (Token("ann", Role.TUNE, digest(b"a" * 24)), Token("bob", Role.VIEW, digest(b"b" * 24)))
    before = logs.level()
    app = create_app(DiskStorage(tmp_path / "store"), sweep_s=3600, access=Access(lambda: tokens))
    with Server(app, "127.0.0.1", 0, key="snapshot_store") as server:
        (tmp_path / run_folder.RUN_FILE).touch()
        (tmp_path / run_folder.ADDRESSES).write_text(json.dumps({"snapshot_store": f"http://127.0.0.1:{server.port}"}))
        monkeypatch.setenv(OPERATOR_TOKEN, "a" * 24)
        yield tmp_path
    logs.set_level(before)


def test_the_level_of_the_store_changes_at_once(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logs.set_level("warning")
    command("set", [str(run), "--service", "snapshot_store", "logs.level=debug"])
    assert logs.level() == "debug"
    command("get", [str(run), "--service=snapshot_store"])
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith(LOG_LEVEL)]
    assert shown == [
        'logs.level: "warning" -> "debug": applied at once',
        'logs.level  "debug"     at once',
    ]


@pytest.mark.parametrize("words", [["logs.level=loud"], ["learner.versions=3"], ["logs.level=info", "run.id=x"]])
def test_another_key_or_value_is_refused(run: Path, words: list[str]) -> None:
    logs.set_level("warning")
    with pytest.raises(UserError, match="refused"):
        command("set", [str(run), "--service", "snapshot_store", *words])
    assert logs.level() == "warning"


def test_a_token_that_may_only_look_changes_nothing(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(OPERATOR_TOKEN, "b" * 24)
    command("get", [str(run), "--service", "snapshot_store"])
    with pytest.raises(UserError, match="refused"):
        command("set", [str(run), "--service", "snapshot_store", "logs.level=debug"])


def test_a_release_has_no_other_service(run: Path) -> None:
    with pytest.raises(UserError, match="a release has gateway and store"):
        command("set", ["--release", "first", "--service", "kafka", "logs.level=debug"])
