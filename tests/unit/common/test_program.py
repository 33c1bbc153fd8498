"""Start and end of a service's process: exit codes and messages."""

import json
import os
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import structlog

from palimpsest.common import termination_message
from palimpsest.common.bus.port import OffsetGone, Outgoing
from palimpsest.common.bus.sqlite import SqliteBus
from palimpsest.common.config import Invocation
from palimpsest.common.files import atomic_write
from palimpsest.common.program import service
from palimpsest.common.service import Stop
from palimpsest.common.user_error import ExitCode, UserError
from tests.processes.waiting import LIMIT_S

RUN = """
run.id = "first"
run.folder = "{folder}"
model.path = "none"
tasks.environments = {{ lookup = 1.0 }}
learner.versions = 1
"""

Body = Callable[[Invocation, Stop], None]


@dataclass(frozen=True)
class Ended:
    """Exit code and output of a program."""

    code: int
    output: str
    errors: str


End = Callable[..., Ended]


@pytest.fixture
def end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[End]:
    """Run a service with this body to its end in this process."""
    run = tmp_path / "run.toml"
    run.write_text(RUN.format(folder=tmp_path / "runs"))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def end(body: Body, *flags: str, name: str = "snapshot_store") -> Ended:
        monkeypatch.setattr(sys, "argv", ["service", str(run), *flags])
        try:
            service(name, body)
            code = 0
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        output = capsys.readouterr()
        return Ended(code, output.out, output.err)

    yield end
    for number, handler in handlers.items():
        signal.signal(number, handler)
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


def refusing(code: ExitCode) -> Body:
    def body(_invocation: Invocation, _stop: Stop) -> None:
        raise UserError("the model is gone: put it back", code)

    return body


def never(_invocation: Invocation, _stop: Stop) -> None:
    raise AssertionError("the body ran")


def test_a_finished_service_exits_0_without_a_message(end: End) -> None:
    given: list[str] = []
    assert end(lambda invocation, _: given.append(invocation.config.run.id)) == Ended(0, "", "")
    assert given == ["first"]


@pytest.mark.parametrize(
    ("code", "number"),
    [("CRASHED", 1), ("CONFIGURATION", 2), ("UNAVAILABLE", 3), ("DAMAGED", 4), ("CANARY", 5), ("REPLACED", 6)],
)
def test_a_user_error_prints_one_message_and_gives_its_exit_code(end: End, code: str, number: int) -> None:
    assert end(refusing(ExitCode[code])) == Ended(number, "", "the model is gone: put it back\n")


def test_a_user_error_is_written_to_the_runs_folder_for_the_supervisor(end: End, tmp_path: Path) -> None:
    end(refusing(ExitCode.DAMAGED))
    left = tmp_path / "runs" / "first" / "refusals" / "snapshot_store.json"
    report = json.loads(left.read_text())
    assert report.pop("processes") == [os.getpid(), os.getppid()], "the service and its launcher"
    assert report == {"message": "the model is gone: put it back", "code": 4}


def test_a_user_error_is_the_termination_message_of_a_container(
    end: End, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = tmp_path / "termination-log"
    monkeypatch.setattr(termination_message, "FILE", message)
    end(refusing(ExitCode.DAMAGED))
    assert not message.exists(), "outside Kubernetes there is no such file"
    message.touch()
    end(refusing(ExitCode.DAMAGED))
    assert message.read_text() == "the model is gone: put it back"


def test_a_workers_user_error_is_written_under_its_name(end: End, tmp_path: Path) -> None:
    end(refusing(ExitCode.CANARY), "--rollout.worker=worker-3", name="rollout")
    assert [path.name for path in (tmp_path / "runs" / "first" / "refusals").iterdir()] == ["worker-3.json"]


def test_a_user_error_is_printed_if_the_runs_folder_is_not_writable(end: End, tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file where the folder should be")
    assert end(refusing(ExitCode.CANARY)) == Ended(5, "", "the model is gone: put it back\n")


def test_a_full_disk_prints_one_message_and_gives_exit_code_3(end: End) -> None:
    ended = end(lambda _, __: Path("/dev/full").write_bytes(b"x") and None)
    sentence = "the disk is full: free some space and start again; a run resumes from its last checkpoint\n"
    assert ended == Ended(3, "", sentence)


def test_a_full_disk_is_reported_with_its_file(end: End) -> None:
    def body(_invocation: Invocation, _stop: Stop) -> None:
        raise OSError(28, "No space left on device", "/runs/x")

    assert end(body).errors.startswith("the disk is full (writing /runs/x): ")


def test_a_full_disk_is_written_to_the_runs_folder_for_the_supervisor(end: End, tmp_path: Path) -> None:
    end(lambda _, __: Path("/dev/full").write_bytes(b"x") and None, name="learner")
    left = json.loads((tmp_path / "runs" / "first" / "refusals" / "learner.json").read_text())
    assert (left["code"], left["message"][:16]) == (3, "the disk is full")


def test_an_atomic_write_on_a_full_disk_names_its_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space") as full, atomic_write(tmp_path / "state"):
        Path("/dev/full").write_bytes(b"x")
    assert full.value.filename == str(tmp_path / "state")


def test_a_full_disk_of_the_log_is_reported_like_that_of_a_file(end: End, tmp_path: Path) -> None:
    def body(invocation: Invocation, _stop: Stop) -> None:
        bus = SqliteBus(invocation.config.bus_path)
        bus.create_topics({"t": 1})
        bus._db.execute("PRAGMA max_page_count = 20")
        bus.publish("t", [Outgoing("k", bytes(1 << 20))])

    ended = end(body)
    assert ended.code == 3
    assert ended.errors.startswith(f"the disk is full (writing {tmp_path}/runs/first/bus.sqlite): ")


def test_a_gap_in_the_log_prints_one_message_and_gives_exit_code_4(end: End) -> None:
    def body(_invocation: Invocation, _stop: Stop) -> None:
        raise OffsetGone("tasks[0]: offset 7 is gone, the log starts at 9")

    ended = end(body)
    assert ended.code == 4
    assert (
        "the next record: tasks[0]: offset 7 is gone, the log starts at 9. Reading on would skip records"
        in ended.errors
    )


def test_other_errors_give_a_traceback(end: End) -> None:
    def body(_invocation: Invocation, _stop: Stop) -> None:
        raise FileNotFoundError(2, "no", "x")

    with pytest.raises(FileNotFoundError):
        end(body)


def test_an_unusable_file_prints_one_message_and_gives_exit_code_2(end: End, tmp_path: Path) -> None:
    def body(_invocation: Invocation, _stop: Stop) -> None:
        (tmp_path / "run.toml" / "below a file").write_bytes(b"x")

    ended = end(body)
    assert ended.code == 2
    assert ended.errors.startswith(f"{tmp_path}/run.toml/below a file cannot be used: a part of that path is a file, ")


@pytest.mark.parametrize("name", ["learner", "learner.replica", "rollout"])
def test_an_unwritable_run_folder_ends_a_service_before_its_body(end: End, tmp_path: Path, name: str) -> None:
    (tmp_path / "runs").write_text("a file where the folder should be")
    ended = end(never, name=name)
    assert (ended.code, ended.output) == (2, "")
    assert ended.errors.startswith(f"run.folder: cannot write to {tmp_path}/runs/first: a part of that path ")


def test_an_unusable_path_of_the_log_prints_one_message(end: End, tmp_path: Path) -> None:
    (tmp_path / "bus.sqlite").mkdir()
    ended = end(lambda _, __: SqliteBus(tmp_path / "bus.sqlite") and None)
    assert ended.code == 2
    assert ended.errors.startswith(f"{tmp_path}/bus.sqlite cannot be used: there is a folder where a file is needed")


def test_ctrl_c_gives_exit_code_130(end: End) -> None:
    def body(_invocation: Invocation, _stop: Stop) -> None:
        raise KeyboardInterrupt

    assert end(body) == Ended(130, "", "")


def test_a_service_stops_on_sigterm_and_exits_130(end: End) -> None:
    stopped: list[bool] = []

    def body(_invocation: Invocation, stop: Stop) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        stopped.append(stop.wait(LIMIT_S))

    assert end(body) == Ended(130, "", "")
    assert stopped == [True]


def test_an_invalid_key_gives_exit_code_2_and_the_body_never_runs(end: End) -> None:
    ended = end(never, "--run.sed=3")
    assert (ended.code, ended.output) == (2, "")
    assert "did you mean run.seed?" in ended.errors


def test_a_manually_started_service_needs_the_runs_id(end: End) -> None:
    ended = end(never, "--run.id=")
    assert (ended.code, ended.output) == (2, "")
    assert ended.errors.startswith("run.id is empty")


def test_check_shows_the_run_and_the_body_never_runs(end: End) -> None:
    ended = end(never, "--check", "--run.seed=7")
    assert (ended.code, ended.errors) == (0, "")
    assert tomllib.loads(ended.output)["run"]["seed"] == 7


def test_the_exit_code_is_that_of_the_process(tmp_path: Path) -> None:
    absent = tmp_path / "none.toml"
    done = subprocess.run(
        [sys.executable, "-m", "palimpsest.services.snapshot_store", str(absent)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"{absent}: no such file. Start from a copy of examples/embedded.toml\n"
