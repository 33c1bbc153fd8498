"""The start of a server waits for its recovery while it makes progress, and ends without progress."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from palimpsest.common.user_error import ExitCode, UserError
from tools.backends.process import Server
from tools.backends.recovery import LogRecovery, ProgressLimit

LIMIT_S, STEP_S = 60.0, 50.0
"""Seconds of the test's clock; one step takes less than the limit, ten steps take more."""
SERVER = """
import pathlib, sys, time
steps, folder = int(sys.argv[1]), pathlib.Path.cwd()
for step in range(1, steps + 1):
    while not (folder / f"step-{step}").exists():
        time.sleep(0.01)
    print(f"INFO Completed load of Log(a) with 1 segments in 9ms ({step}/10 completed in /d) (LogManager)", flush=True)
while True:
    print("WARN Connection to node -1 could not be established (NetworkClient)", flush=True)
    time.sleep(0.05)
"""


class Recovering(Server):
    """A process that makes one step at each call of `answers`, up to `steps`, and answers after ten steps."""

    title = "Kafka"

    def __init__(self, folder: Path, steps: int) -> None:
        super().__init__(folder, None)
        self.steps, self.answered, self.now = steps, 0, 0.0
        self.clock = lambda: self.now

    def prepare(self) -> None:
        pass

    def command(self) -> list[str]:
        return [sys.executable, "-c", SERVER, str(self.steps)]

    def answers(self) -> bool:
        if self.answered == 10:
            return self.steps == 10
        self.answered += 1
        self.now += STEP_S
        (self.folder / f"step-{self.answered}").touch()
        if self.answered <= self.steps:
            guard = time.monotonic() + 600
            while f"({self.answered}/10 completed" not in self.log.read_text():
                assert time.monotonic() < guard
                time.sleep(0.01)
        return False


def test_a_recovery_with_progress_may_take_longer_than_the_limit(tmp_path: Path) -> None:
    lines: list[str] = []
    server = Recovering(tmp_path, steps=10)
    server.start(LIMIT_S, lines.append)
    try:
        assert server.running
        assert server.now == 10 * STEP_S > LIMIT_S
        assert lines[:2] == [f"Kafka recovers its log: {n} of 10 partitions" for n in (1, 2)]
    finally:
        server.kill()


def test_a_recovery_without_progress_is_ended_although_the_server_logs(tmp_path: Path) -> None:
    server = Recovering(tmp_path, steps=3)
    with pytest.raises(UserError, match=r"made no progress for 60 s \(it has recovered 3 of 10 partitions") as error:
        server.start(LIMIT_S)
    assert error.value.code is ExitCode.UNAVAILABLE
    assert "it was killed" in str(error.value)
    assert not server.running


def test_the_recovery_of_an_earlier_start_does_not_count(tmp_path: Path) -> None:
    (tmp_path / "kafka.log").write_text("INFO (9/10 completed in /d)\n")
    server = Recovering(tmp_path, steps=0)
    with pytest.raises(UserError, match=r"made no progress for 60 s; it was killed"):
        server.start(LIMIT_S)


def test_progress_is_read_from_kafkas_log() -> None:
    recovery = LogRecovery()
    for line in (
        "2026-11-28 17:00:01,000 INFO  Starting (org.apache.kafka)",
        "INFO  [LogLoader partition=a-0, dir=/d] Recovering unflushed segment 0. 2 recovered for a-0. (LogLoader)",
    ):
        recovery.read(line)
    assert (recovery.steps, recovery.progress) == (1, "2 segments of another")
    recovery.read("INFO  Completed load of UnifiedLog(a-0) with 3 segments, in 40ms (1/5 completed in /d) (LogManager)")
    assert (recovery.steps, recovery.progress) == (2, "1 of 5 partitions")


def test_the_limit_ends_without_progress() -> None:
    limit = ProgressLimit(60, now=0)
    assert not limit.ended(0, 60)
    assert not limit.ended(1, 110)
    assert not limit.ended(1, 170)
    assert limit.ended(1, 171)


def test_a_closed_pipe_ends_the_command_without_output(tmp_path: Path) -> None:
    """As in `make up | head -1`."""
    command = [sys.executable, "-m", "tools.backends", "status", str(tmp_path)]
    root = Path(__file__).resolve().parents[3]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == ""
        assert process.wait(600) == ExitCode.UNAVAILABLE


def test_an_impossible_folder_is_reported_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    command = [sys.executable, "-m", "tools.backends", "up", str(tmp_path / "file" / "backends")]
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == ExitCode.UNAVAILABLE
    assert done.stderr.startswith("backends: ")
    assert "FOLDER=" in done.stderr
    assert "Traceback" not in done.stderr
