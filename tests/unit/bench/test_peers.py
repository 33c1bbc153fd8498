"""bench/peers: what the observer computes from the steps of a side, and both sides once."""

import sys
from pathlib import Path, PosixPath

import pytest

from bench.peers.observer import ObservedStep, Side, observe
from tests.unit.bench.test_bench import measured

STEPS = [
    ObservedStep(at_s=12.0, cpu_s=20.0, tokens=100, successes="0000"),
    ObservedStep(at_s=14.0, cpu_s=23.0, tokens=120, successes="0111"),
    ObservedStep(at_s=15.0, cpu_s=25.0, tokens=140, successes="1111"),
]
SIDE = Side(STEPS, first_s=2.0)


def test_rates_are_between_the_first_step_and_the_last() -> None:
    assert SIDE.from_first_to_last() == (3.0, 5.0, 2)


def test_the_time_before_the_first_step_is_no_time_of_the_run() -> None:
    assert (SIDE.start_s, SIDE.whole_s) == (10.0, 5.0)


def test_success_is_reached_when_the_newest_trajectories_have_it() -> None:
    assert SIDE.seconds_to(0.75, newest=4) == 4.0
    assert SIDE.seconds_to(0.75, newest=8) == 5.0, "the mean of 0111 and 1111 is 0.875, that of 0000 and 0111 is 0.375"
    assert SIDE.seconds_to(0.9, newest=8) is None
    assert SIDE.seconds_to(0.5, newest=16) is None, "there are only twelve"
    assert SIDE.success(newest=8) == 0.875


class ReadLines(PosixPath):
    """A file that has a neighbor `NAME.N` once its N lines have been read."""

    def read_bytes(self) -> bytes:
        body = super().read_bytes()
        Path(f"{self}.{body.count(10)}").touch()
        return body


def test_the_processor_time_of_descendants_counts(tmp_path: Path) -> None:
    # The child's child computes for 0.4 s of processor time, then writes two lines, and waits until each has been read.
    worker = (
        "import os, sys, time\n"
        "while time.process_time() < 0.4: pass\n"
        "for number in (1, 2):\n"
        "    with open(sys.argv[1], 'a') as lines:\n"
        '        lines.write(\'{"seconds": 0.1, "tokens": 5, "successes": "1"}\\n\')\n'
        "    while not os.path.exists(f'{sys.argv[1]}.{number}'): time.sleep(0.01)\n"
    )
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {worker!r}, sys.argv[1]], check=True)"
    lines = ReadLines(tmp_path / "steps.jsonl")
    side = observe([sys.executable, "-c", program, str(lines)], lines)
    assert [step.tokens for step in side.steps] == [5, 5]
    assert side.steps[-1].cpu_s >= 0.4


def test_a_program_that_fails_gives_no_figures(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="ended with code 3"):
        observe([sys.executable, "-c", "raise SystemExit(3)"], tmp_path / "none")


@pytest.mark.long
def test_both_sides_train() -> None:
    figures = measured("peers", "--steps=3", "--seeds=1")
    for side in ("ours", "trl"):
        (run,) = figures["sides"][side]
        assert run["steps"] == 3
        assert run["trained_tokens_per_s"] > 0
        assert run["cpu_seconds_per_step"] > 0
    assert figures["settings"]["environment"] == "lookup"
