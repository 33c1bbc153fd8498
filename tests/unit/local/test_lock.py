"""The lock that allows one supervisor per run."""

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


def test_an_active_run_is_refused_until_its_supervisor_exits(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDS, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError) as error:
            RunLock(tmp_path, now=NOW)
        message = str(error.value)
        assert message.startswith(f"the run in {tmp_path} is active: process {holder.pid} of ")
        assert "(since 2026-11-28 11:00:00+00:00) supervises it" in message
        assert f"`kill {holder.pid}`" in message
        assert error.value.code is ExitCode.UNAVAILABLE
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with RunLock(tmp_path, now=NOW):
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()


def test_a_process_cannot_lock_a_run_twice(tmp_path: Path) -> None:
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


def test_an_unreadable_lock_file_still_refuses(tmp_path: Path) -> None:
    with RunLock(tmp_path, now=NOW):
        (tmp_path / "lock").write_text("not JSON")
        with pytest.raises(UserError, match="is active: another process supervises it"):
            RunLock(tmp_path, now=NOW)
