"""A whole run on an agent program over the official OpenAI client, with cuts, branches and a learning rate of almost 0.

The engine is scripted; tokens, versions, cuts, scores, training and audit are real.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from palimpsest.common.branches import sequences
from palimpsest.common.bus.sqlite import SqliteBus
from palimpsest.common.messages import TRAJECTORIES, SegmentFlushed, TrajectoryFinished, decode
from palimpsest.rescore import Models, rescore
from tests.runs.run_process import RunProcess, check_ledger, history, scripted
from tools.backends.packages import UV, interpreter

pytestmark = [pytest.mark.servers, pytest.mark.long]
PROGRAM = Path(__file__).parents[1] / "runs" / "agent_program.py"
AGENT = f'{{"program" = {{"command" = {json.dumps([sys.executable, str(PROGRAM)])}, "max_processes" = 4}}}}'
VERSIONS = 3
LAYOUTS = 5e-3
"""Nats. Largest effect of padding on a log-prob of the small bf16 model."""


def messages(home: Path) -> list[TrajectoryFinished | SegmentFlushed]:
    bus, found = SqliteBus(home / "bus.sqlite"), []
    with bus.consumer(TRAJECTORIES) as consumer:
        while batch := consumer.poll(limit=1000, timeout_s=0):
            found += [decode(TRAJECTORIES, record.body) for record in batch]
    bus.close()
    return found


def test_a_run_on_a_program_is_exact_and_accounted_for(tmp_path: Path, starting_model: Path) -> None:
    toml, home = scripted(tmp_path, starting_model, versions=VERSIONS, tokens_per_s=20.0), tmp_path / "scripted"
    run = RunProcess(
        toml,
        '--tasks.environments={"program" = 1.0}',
        f"--rollout.agents={AGENT}",
        "--tasks.samples_per_group=4",
        "--learner.groups_per_batch=2",
        "--learner.max_staleness=1",
        "--learner.proximal.kind=interruption",
        "--learner.record=true",
        "--learner.checkpoint.keep=1000",
        "--learner.optimizer.lr=1e-12",
    )
    try:
        code, output = run.finish()
    finally:
        run.kill_everything()
    assert code == 0, output[-3000:]
    sums = check_ledger(home, max_staleness=1)
    assert sums["dead_lettered"] == 0
    assert "environment_failed" not in sums["dropped"]
    finished = {one.trajectory: one for one in messages(home) if isinstance(one, TrajectoryFinished)}
    trained = [finished[f"{g}/{n}"] for line in history(home) for g, samples in line["groups"].items() for n in samples]
    assert all(len(one.branches) == (int(one.trajectory[-1]) % 3 == 0) for one in trained)
    rows, worst = set[str](), 0.0
    for path in sorted((home / "records").glob("*.npz")):
        with np.load(path) as arrays:
            for i in range(sum(name.startswith("tokens_") for name in arrays)):
                rows |= set(arrays[f"trajectories_{i}"].tolist())
                exact = arrays[f"exact_{i}"] & (arrays[f"versions_{i}"] >= 0)
                ratio = np.abs(arrays[f"current_{i}"] - arrays[f"proximal_{i}"])[exact]
                worst = max(worst, float(ratio.max(initial=0.0)))
    assert rows == {part.trajectory for one in trained for part in sequences(one)}
    assert worst <= LAYOUTS  # the weights never change, so the staleness ratio is 1
    assert (
        rescore(home / "records", Models(home / "snapshots", str(starting_model), "eager"))["alone_max_abs"] <= LAYOUTS
    )


def test_a_taskset_of_verifiers_drives_the_model_and_is_accounted_for(tmp_path: Path, starting_model: Path) -> None:
    toml, home = scripted(tmp_path, starting_model, versions=2), tmp_path / "scripted"
    program = Path(__file__).parents[2] / "examples" / "agents" / "verifiers_agent.py"
    python = str(interpreter("verifiers==0.4.0"))
    path = f"PATH={Path(UV).parent}:/usr/bin:/bin"  # verifiers starts its chat program with uv
    command = ["/usr/bin/env", path, f"PYTHONPATH={PROGRAM.parent}", python, str(program), "verifiers_words"]
    run = RunProcess(
        toml,
        '--tasks.environments={"words" = 1.0}',
        f"--rollout.agents={{words = {{command = {json.dumps(command)}, max_processes = 2, max_calls = 4}}}}",
        "--tasks.samples_per_group=2",
        "--learner.groups_per_batch=1",
        "--learner.max_staleness=1",
    )
    try:
        code, output = run.finish()
    finally:
        run.kill_everything()
    assert code == 0, output[-3000:]
    sums = check_ledger(home, samples=2, max_staleness=1)
    assert sums["dead_lettered"] == 0
    assert "environment_failed" not in sums["dropped"]
    finished = [one for one in messages(home) if isinstance(one, TrajectoryFinished)]
    assert len(finished) >= 4
    assert all((one.environment, one.turns, one.branches) == ("words", 1, ()) for one in finished)
    assert {one.reward for one in finished} <= {0.0, 1.0}
