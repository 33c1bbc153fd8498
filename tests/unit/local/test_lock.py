"""One supervisor to a run."""

import datetime
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from palimpsest.common.user_error import ExitCode, UserError
from palimpsest.services.local.lock import RunLock

NOW = datetime.datetime(2026, 11, 28, 12, 0, tzinfo=datetime.UTC)
HOLDS = """
import datetime, pathlib, sys, time
from palimpsest.services.local.lock import RunLock
lock = RunLock(pathlib.Path(sys.argv[1]), now=datetime.datetime(2026, 11, 28, 11, 0, tzinfo=datetime.UTC))
print("held", flush=True)
time.sleep(600)
"""


def test_a_run_that_is_alive_is_refused_with_who_has_it_until_that_one_is_gone(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDS, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError) as found:
            RunLock(tmp_path, now=NOW)
        said = str(found.value)
        assert said.startswith(f"the run in {tmp_path} is active: process {holder.pid} of ")
        assert "(since 2026-11-28 11:00:00+00:00) supervises it" in said
        assert f"`kill {holder.pid}`" in said
        assert found.value.code is ExitCode.UNAVAILABLE
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with RunLock(tmp_path, now=NOW):
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()


def test_a_lock_of_one_process_is_not_taken_twice_by_it(tmp_path: Path) -> None:
    with RunLock(tmp_path, now=NOW), pytest.raises(UserError, match=f"process {os.getpid()} of "):
        RunLock(tmp_path, now=NOW)
    RunLock(tmp_path, now=NOW)


def test_a_service_that_outlives_its_supervisor_does_not_hold_the_run(tmp_path: Path) -> None:
    with RunLock(tmp_path, now=NOW):
        lives = "import time; print('lives', flush=True); time.sleep(600)"
        child = subprocess.Popen([sys.executable, "-c", lives], stdout=subprocess.PIPE, close_fds=False)
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == b"lives\n"
        RunLock(tmp_path, now=NOW)
    finally:
        child.kill()
        child.wait()


def test_a_lock_file_that_says_nothing_is_told_of_all_the_same(tmp_path: Path) -> None:
    with RunLock(tmp_path, now=NOW):
        (tmp_path / "lock").write_text("not JSON")
        with pytest.raises(UserError, match="is active: another process supervises it"):
            RunLock(tmp_path, now=NOW)
