"""Failpoints: places where a test makes a running service fail."""

import subprocess
import sys
from pathlib import Path

import pytest

from palimpsest.common import failpoints

REACHES = """
from palimpsest.common import failpoints
for i in range(5):
    print(i, flush=True)
    failpoints.reach("place")
    failpoints.reach("other")
"""


def reached(fault: str | None) -> tuple[int, int]:
    """Return the exit code of a process that reaches the failpoint five times, and how often it reached it."""
    environment = {"PATH": ""} | ({failpoints.VARIABLE: fault} if fault is not None else {})
    done = subprocess.run([sys.executable, "-c", REACHES], env=environment, capture_output=True, text=True, check=False)
    return done.returncode, len(done.stdout.split())


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (None, (0, 5)),
        ("", (0, 5)),
        ("elsewhere:1", (0, 5)),
        ("place", (-9, 1)),
        ("place:1", (-9, 1)),
        ("place:3", (-9, 3)),
        ("place:6", (0, 5)),
        ("elsewhere,place:2", (-9, 2)),
    ],
)
def test_a_process_dies_when_it_reaches_the_failpoint_for_the_nth_time(
    fault: str | None, expected: tuple[int, int]
) -> None:
    assert reached(fault) == expected


@pytest.mark.parametrize(
    ("fault", "expected"), [("", False), ("place", True), ("place:2", True), ("other,place", True), ("placed", False)]
)
def test_a_fault_is_active_when_it_is_named(monkeypatch: pytest.MonkeyPatch, fault: str, expected: bool) -> None:
    monkeypatch.setenv(failpoints.VARIABLE, fault)
    assert failpoints.active("place") is expected


def test_a_fault_can_be_active_while_a_file_exists(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(failpoints.VARIABLE, f"place:{tmp_path / 'on'}")
    assert not failpoints.active("place")
    (tmp_path / "on").touch()
    assert failpoints.active("place")
