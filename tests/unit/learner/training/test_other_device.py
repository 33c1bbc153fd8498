"""Training on a device besides the CPU never mixes tensors of two devices."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes.waiting import LIMIT_S
from tests.runs.run_process import ROOT

SOME = ("packed", "offload", "ppo_gae", "all rules")


@pytest.mark.thorough
def test_a_version_is_trained_on_another_device(starting_model: Path) -> None:
    """In a process of its own, in which torch knows a device that refuses tensors of the CPU (other_device.py)."""
    assert_trained(starting_model, *SOME)


@pytest.mark.long
def test_a_version_is_trained_on_another_device_with_every_recipe(starting_model: Path) -> None:
    assert_trained(starting_model)


def assert_trained(model: Path, *cases: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.processes.train_elsewhere", str(model), *cases],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=LIMIT_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
