"""The plan of a sharded run is what the trainer of each of two ranks holds."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from palimpsest.plan.learner_memory import RESULTS, learner_memory, pass_shape
from palimpsest.plan.rehearsal import rehearse
from tests.processes.plan_on_ranks import LEARNER, LENGTH, SAMPLES
from tests.processes.waiting import LIMIT_S
from tests.runs.run_process import ROOT

pytestmark = pytest.mark.servers


def test_each_cause_is_within_ten_percent_of_what_a_rank_holds(tmp_path: Path, starting_model: Path) -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m")
    done = subprocess.run(
        [sys.executable, *launcher, "tests.processes.plan_on_ranks", str(starting_model), str(tmp_path)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=LIMIT_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    shape = pass_shape(LEARNER, LENGTH, "sdpa")
    memory = learner_memory(LEARNER, rehearse(str(starting_model), shape), shape, ranks=2, samples=SAMPLES, gpu=False)
    planned = {cause.name: cause.size for cause in (*memory.held, *memory.largest.causes)}
    assert {cause.name for cause in memory.held} | {RESULTS} == torch.load(tmp_path / "held 0.pt").keys()
    for rank in range(2):
        held = torch.load(tmp_path / f"held {rank}.pt")
        for name, size in held.items():
            assert planned[name] == pytest.approx(size, rel=0.1), (rank, name)
