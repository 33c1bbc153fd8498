"""The identity of a process differs from that of a later process with its id, which is not ended."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from tests.processes.waiting import LIMIT_S
from tools.backends.process_identity import Identity

STUBBORN = """
import signal, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("ready", flush=True)
signal.pause()
"""


@pytest.fixture
def sleeper() -> Iterator["subprocess.Popen[bytes]"]:
    """A process that sleeps until it is ended."""
    with subprocess.Popen(["sleep", "600"]) as process:
        yield process
        process.kill()


def identity_of(process: "subprocess.Popen[bytes]") -> Identity:
    identity = Identity.of(process.pid)
    assert identity is not None
    return identity


def test_a_running_process_is_alive(sleeper: "subprocess.Popen[bytes]") -> None:
    identity = identity_of(sleeper)
    assert identity.pid == sleeper.pid
    assert identity.alive


def test_the_identity_does_not_change_during_the_start() -> None:
    """The command line does change: it is often empty right after the start."""
    for _ in range(20):
        with subprocess.Popen([sys.executable, "-c", STUBBORN], stdout=subprocess.PIPE) as process:
            at_once = identity_of(process)
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            assert at_once.alive
            process.kill()


def test_an_ended_process_is_not_alive_before_its_parent_waits_for_it(sleeper: "subprocess.Popen[bytes]") -> None:
    identity = identity_of(sleeper)
    identity.end()
    assert not identity.alive
    assert Path(f"/proc/{sleeper.pid}").exists()  # no process has waited for it yet
    assert sleeper.wait() == -signal.SIGTERM
    assert Identity.of(sleeper.pid) is None


@pytest.mark.parametrize("changed", [{"started": 1}, {"boot": "another"}])
def test_another_process_with_the_same_id_is_not_ended(
    sleeper: "subprocess.Popen[bytes]", changed: dict[str, object]
) -> None:
    stale = msgspec.structs.replace(identity_of(sleeper), **changed)
    assert not stale.alive
    stale.end()
    assert sleeper.poll() is None


def test_an_identity_is_written_and_read(tmp_path: Path, sleeper: "subprocess.Popen[bytes]") -> None:
    file = tmp_path / "process.json"
    assert Identity.read(file) is None
    identity_of(sleeper).write(file)
    assert Identity.read(file) == identity_of(sleeper)
    file.write_bytes(file.read_bytes()[:-5])
    assert Identity.read(file) is None


def test_a_stopped_process_is_ended(sleeper: "subprocess.Popen[bytes]") -> None:
    sleeper.send_signal(signal.SIGSTOP)
    identity_of(sleeper).end()
    assert sleeper.wait(LIMIT_S) == -signal.SIGTERM


def test_a_process_that_ignores_sigterm_is_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", STUBBORN], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        identity_of(process).end(timeout_s=0.2)
        assert process.wait(LIMIT_S) == -signal.SIGKILL


def test_a_name_with_brackets_and_spaces_does_not_shift_the_fields(tmp_path: Path) -> None:
    odd = tmp_path / "a) S 1 (b"
    odd.symlink_to("/bin/sleep")
    with subprocess.Popen([odd, "600"]) as first, subprocess.Popen(["sleep", "600"]) as second:
        one, other = identity_of(first), identity_of(second)
        first.kill()
        second.kill()
    assert (one.pid, other.pid) == (first.pid, second.pid)
    assert 0 <= other.started - one.started < 100 * LIMIT_S  # ticks of 10 ms between two starts in sequence
