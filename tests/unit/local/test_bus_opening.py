"""Opening a log whose broker is away: told of, and a stop is heard at once."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from palimpsest.common.bus.port import Bus
from palimpsest.common.bus.sqlite import SqliteBus
from palimpsest.common.config import load
from palimpsest.common.config.schema import RunConfig
from palimpsest.common.outages import OUTAGES
from palimpsest.common.service import Stop
from palimpsest.common.user_error import ExitCode, UserError
from palimpsest.services.local import bus_opening
from palimpsest.services.local.bus_opening import open_run_bus
from tests.processes.waiting import LIMIT_S
from tests.runs.run_process import ROOT

NOBODY = "127.0.0.1:1"
RUN = 'run.id = "t"\nmodel.path = "{model}"\ntasks.environments = {{ lookup = 1.0 }}\nlearner.versions = 3\n'


@pytest.fixture(autouse=True)
def _logged() -> Iterator[None]:
    yield
    OUTAGES.logged = True


def run_file(folder: Path, model: Path | str = "m", *, kind: str = "kafka") -> Path:
    path = folder / "mine.toml"
    path.write_text(
        RUN.format(model=model) + f'run.folder = "{folder}"\nbus.kind = "{kind}"\nbus.servers = "{NOBODY}"\n'
    )
    return path


def config(folder: Path, *, kind: str = "kafka") -> RunConfig:
    return load([str(run_file(folder, kind=kind))], {}, program="").config


class Broker:
    """A log that opens when it is told to go on."""

    def __init__(self, folder: Path, ends: Callable[[], None] = lambda: None) -> None:
        self._path, self._ends = folder / "bus.sqlite", ends
        self.goes_on = threading.Event()

    def open(self, _: RunConfig) -> Bus:
        assert self.goes_on.wait(LIMIT_S)
        self._ends()
        return SqliteBus(self._path)


def test_a_broker_that_is_waited_for_is_told_of_once_and_so_is_its_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bus_opening, "SAY_S", 0.0)
    broker, said = Broker(tmp_path), list[str]()

    def say(line: str) -> None:
        said.append(line)
        broker.goes_on.set()

    bus = open_run_bus(config(tmp_path), Stop(), say, how=broker.open)
    assert bus is not None
    bus.close()
    assert said == [
        f"waiting for Kafka at {NOBODY}: start the broker, or correct bus.servers; Ctrl-C stops",
        f"Kafka at {NOBODY} answers",
    ]


def test_a_log_that_opens_soon_is_not_worth_a_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bus_opening, "SAY_S", LIMIT_S)
    broker, said = Broker(tmp_path), list[str]()
    broker.goes_on.set()
    with closing(open_run_bus(config(tmp_path), Stop(), said.append, how=broker.open)) as bus:  # type: ignore[type-var]
        assert isinstance(bus, SqliteBus)
    with closing(open_run_bus(config(tmp_path, kind="sqlite"), Stop(), said.append)) as bus:  # type: ignore[type-var]
        assert isinstance(bus, SqliteBus)
    assert said == []


def test_what_ends_the_waiting_is_passed_on(tmp_path: Path) -> None:
    def refuse() -> None:
        raise UserError("refuses access", ExitCode.UNAVAILABLE)

    broker = Broker(tmp_path, refuse)
    broker.goes_on.set()
    with pytest.raises(UserError, match="refuses access") as refused:
        open_run_bus(config(tmp_path), Stop(), print, how=broker.open)
    assert refused.value.code is ExitCode.UNAVAILABLE


def test_a_stop_is_heard_while_the_broker_is_away(tmp_path: Path) -> None:
    stop, broker = Stop(), Broker(tmp_path)
    stop.request()
    try:
        assert open_run_bus(config(tmp_path), stop, print, how=broker.open) is None
    finally:
        broker.goes_on.set()


@pytest.mark.servers
def test_a_ctrl_c_while_the_broker_is_away_ends_the_program_with_the_command_to_go_on(
    tmp_path: Path, starting_model: Path
) -> None:
    """As a person meets it: the line, Ctrl-C, the command."""
    command = [sys.executable, "-u", "-m", "palimpsest", "run", str(run_file(tmp_path, starting_model))]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run:
        assert run.stdout is not None
        waiting = next(line for line in run.stdout if line.startswith("waiting for Kafka"))
        os.kill(run.pid, signal.SIGINT)
        said = run.stdout.read()
    assert waiting.startswith(f"waiting for Kafka at {NOBODY} ({NOBODY}: Connection refused) until ")
    assert said.startswith("Stopped before any service started. Continue with:\n")
    assert f"-m palimpsest run --resume {tmp_path / 't'}\n" in said
    assert "no answer" not in said, "the log's own lines stay out of the terminal"
    assert run.returncode == int(ExitCode.INTERRUPTED)
