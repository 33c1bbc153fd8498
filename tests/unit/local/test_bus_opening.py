"""Opening a log whose broker does not answer: the message, and a stop during the wait."""

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
from palimpsest.common.outages import KAFKA, OUTAGES
from palimpsest.common.service import Stop
from palimpsest.common.user_error import ExitCode, UserError
from palimpsest.services.local import bus_opening
from palimpsest.services.local.bus_opening import open_run_bus
from tests.processes.waiting import LIMIT_S
from tests.runs.run_process import ROOT

UNREACHABLE = "127.0.0.1:1"
RUN = 'run.id = "t"\nmodel.path = "{model}"\ntasks.environments = {{ lookup = 1.0 }}\nlearner.versions = 3\n'
RUN += "sampling.max_trajectory_tokens = 1000\n"


@pytest.fixture(autouse=True)
def _logged() -> Iterator[None]:
    yield
    OUTAGES.logged = True


def run_file(folder: Path, model: Path | str = "m", *, kind: str = "kafka") -> Path:
    path = folder / "mine.toml"
    path.write_text(
        RUN.format(model=model) + f'run.folder = "{folder}"\nbus.kind = "{kind}"\nbus.servers = "{UNREACHABLE}"\n'
    )
    return path


def config(folder: Path, *, kind: str = "kafka") -> RunConfig:
    return load([str(run_file(folder, kind=kind))], {}, program="").config


class Broker:
    """A log that opens when `goes_on` is set, or once a line reports the wait."""

    def __init__(self, folder: Path, ends: Callable[[], None] = lambda: None) -> None:
        self._path, self._ends = folder / "bus.sqlite", ends
        self.goes_on, self.lines = threading.Event(), list[str]()

    def say(self, line: str) -> None:
        self.lines.append(line)
        self.goes_on.set()

    def open(self, _: RunConfig) -> Bus:
        assert self.goes_on.wait(LIMIT_S)
        self._ends()
        return SqliteBus(self._path)


def test_the_wait_for_a_broker_and_its_end_are_printed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bus_opening, "SAY_S", 0.0)
    broker = Broker(tmp_path)
    bus = open_run_bus(config(tmp_path), Stop(), broker.say, how=broker.open)
    assert bus is not None
    bus.close()
    assert broker.lines == [
        f"waiting for Kafka at {UNREACHABLE}: start the broker, or correct bus.servers; Ctrl-C stops",
        f"Kafka at {UNREACHABLE} answers",
    ]


def test_the_line_tells_why_the_broker_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bus_opening, "SAY_S", 0.0)
    broker = Broker(tmp_path)
    with OUTAGES.waiting() as call:
        call.record_failure(KAFKA, UNREACHABLE, f"{UNREACHABLE}: Connection refused", until=0.0)
        with closing(open_run_bus(config(tmp_path), Stop(), broker.say, how=broker.open)):  # type: ignore[type-var]
            pass
    assert broker.lines[0].startswith(f"waiting for Kafka at {UNREACHABLE} ({UNREACHABLE}: Connection refused) until ")


def test_a_log_that_opens_soon_prints_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bus_opening, "SAY_S", LIMIT_S)
    broker, lines = Broker(tmp_path), list[str]()
    broker.goes_on.set()
    with closing(open_run_bus(config(tmp_path), Stop(), lines.append, how=broker.open)) as bus:  # type: ignore[type-var]
        assert isinstance(bus, SqliteBus)
    with closing(open_run_bus(config(tmp_path, kind="sqlite"), Stop(), lines.append)) as bus:  # type: ignore[type-var]
        assert isinstance(bus, SqliteBus)
    assert lines == []


def test_an_error_while_waiting_is_raised(tmp_path: Path) -> None:
    def refuse() -> None:
        raise UserError("refuses access", ExitCode.UNAVAILABLE)

    broker = Broker(tmp_path, refuse)
    broker.goes_on.set()
    with pytest.raises(UserError, match="refuses access") as error:
        open_run_bus(config(tmp_path), Stop(), print, how=broker.open)
    assert error.value.code is ExitCode.UNAVAILABLE


def test_a_stop_ends_the_wait_for_a_broker(tmp_path: Path) -> None:
    stop, broker = Stop(), Broker(tmp_path)
    stop.request()
    try:
        assert open_run_bus(config(tmp_path), stop, print, how=broker.open) is None
    finally:
        broker.goes_on.set()


@pytest.mark.servers
def test_a_ctrl_c_during_the_wait_for_a_broker_prints_the_resume_command(tmp_path: Path, starting_model: Path) -> None:
    """The program prints the wait, receives Ctrl-C, and prints the command."""
    command = [sys.executable, "-u", "-m", "palimpsest", "run", str(run_file(tmp_path, starting_model))]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run:
        assert run.stdout is not None
        waiting = next(line for line in run.stdout if line.startswith("waiting for Kafka"))
        os.kill(run.pid, signal.SIGINT)
        output = run.stdout.read()
    assert waiting.startswith(f"waiting for Kafka at {UNREACHABLE}")  # the first attempt may last longer than SAY_S
    assert output.startswith("Stopped before any service started. Continue with:\n")
    assert f"-m palimpsest run --resume {tmp_path / 't'}\n" in output
    assert "no answer" not in output, "log events of the bus are not printed"
    assert run.returncode == int(ExitCode.INTERRUPTED)
