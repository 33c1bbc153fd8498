"""Standard error of an engine: held while the command works, shown when it fails."""

import os
import subprocess
import sys

import pytest

from palimpsest.held_output import HeldOutput

CHILD = [sys.executable, "-c", "import sys; sys.stderr.write('of a child\\n')"]


def start(held: HeldOutput) -> None:
    with held.holding():
        os.write(2, b"of the process\n")
        subprocess.run(CHILD, check=True)
    os.write(2, b"afterwards\n")


def test_the_output_of_a_command_that_works_is_dropped(capfd: pytest.CaptureFixture[str]) -> None:
    with HeldOutput() as held:
        start(held)
    assert capfd.readouterr() == ("", "afterwards\n")


def test_the_output_of_a_command_that_fails_is_shown(capfd: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        with HeldOutput() as held:
            start(held)
            raise ValueError("failed")

    with pytest.raises(ValueError, match="failed"):
        fail()
    assert capfd.readouterr() == ("", "afterwards\nof the process\nof a child\n")
