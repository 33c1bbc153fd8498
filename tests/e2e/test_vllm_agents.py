"""A run on the real engine in which an agent program drives the model over the official OpenAI client.

The weights change in mid-call: the run ends after it has trained on a message with tokens of two versions. Most
messages end earlier, so that takes minutes.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from palimpsest.rescore import Models, rescore
from tests.processes.waiting import LIMIT_S
from tests.runs.endless import ENDLESS, end_after_two_versions
from tests.runs.run_process import ROOT, RunProcess, check_ledger, history, wait_for

pytestmark = [pytest.mark.vllm, pytest.mark.servers, pytest.mark.long]
PROGRAM = ROOT / "tests" / "runs" / "agent_program.py"
AGENT = f'{{"program" = {{"command" = {json.dumps([sys.executable, str(PROGRAM)])}, "max_processes" = 4}}}}'
SAMPLES = 4
DISCREPANCY = 0.3
"""Nats. Far above the rounding of the small bf16 model, far below the log-prob of a token that was not sampled."""


class Recorded(NamedTuple):
    """A recorded micro-batch: arrays [rows, length]."""

    versions: NDArray[np.int32]
    behavior: NDArray[np.float32]
    old: NDArray[np.float32]
    exact: NDArray[np.bool_]


def recorded(path: Path) -> Iterator[Recorded]:
    """The micro-batches of the file of a version."""
    with np.load(path) as arrays:
        for i in range(sum(name.startswith("tokens_") for name in arrays)):
            yield Recorded(*(arrays[f"{name}_{i}"] for name in ("versions", "behavior", "proximal", "exact")))


def changed_in_mid_call(versions: NDArray[np.int32]) -> bool:
    """Whether two neighboring sampled tokens have different versions. They are of one message: a prompt parts two."""
    before, after = versions[:, :-1], versions[:, 1:]
    return bool(((before != after) & (before >= 0) & (after >= 0)).any())


class FirstChange:
    """Looks for a change in mid-call in the records of a run, each read once."""

    def __init__(self, home: Path) -> None:
        self._home, self._read = home, 0

    def __call__(self) -> bool:
        paths = sorted((self._home / "records").glob("*.npz"))[self._read :]
        self._read += len(paths)
        return any(changed_in_mid_call(one.versions) for path in paths for one in recorded(path))


def test_tokens_of_a_program_are_the_engines_while_weights_change(tmp_path: Path, starting_model: Path) -> None:
    home = tmp_path / "agents"
    run = RunProcess(
        "examples/embedded.toml",
        f"--run.folder={tmp_path}",
        "--run.id=agents",
        f"--model.path={starting_model}",
        ENDLESS,
        '--tasks.environments={"program" = 1.0}',
        f"--rollout.agents={AGENT}",
        "--rollout.max_live=16",
        f"--tasks.samples_per_group={SAMPLES}",
        "--learner.groups_per_batch=1",
        "--learner.record=true",
        "--learner.checkpoint.keep=1000",
        "--sampling.max_turn_tokens=200",
        "--sampling.max_trajectory_tokens=900",
    )
    try:
        wait_for(FirstChange(home), run, name="a change of weights in mid-call")
        end_after_two_versions(run, home)
        code, output = run.finish(within_s=LIMIT_S)
    finally:
        run.kill_everything()
    assert code == 0, output[-4000:]
    sums: dict[str, Any] = check_ledger(home, samples=SAMPLES)
    assert sums["dead_lettered"] == 0
    assert "environment_failed" not in sums["dropped"]
    exact = 0
    for one in (one for path in sorted((home / "records").glob("*.npz")) for one in recorded(path)):
        chosen = one.exact & (one.versions >= 0)
        exact += int(chosen.sum())
        assert np.abs(one.old - one.behavior)[chosen].max(initial=0.0) <= DISCREPANCY
    assert exact == sum(line["tokens"] for line in history(home))
    seen = rescore(home / "records", Models(home / "snapshots", str(starting_model), "eager"))
    assert seen["versions"] > 1
    assert seen["alone_max_abs"] <= 5e-3
