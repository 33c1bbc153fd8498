"""Whole runs with one key changed: another environment in place of `lookup`, and an evaluation on it.

The engine is scripted, so nothing is learned. The runs show that each environment trains to the end and balances.
"""

import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import pytest

from palimpsest.common.environments.tool_calls import render
from palimpsest.common.evaluation.lines import evaluation_lines
from tests.runs.run_process import ROOT, SCRIPTED, RunProcess, check_ledger, history
from tests.servers.adapter_servers import OrsServer

pytestmark = [pytest.mark.servers, pytest.mark.long]
PROGRAMS = ROOT / "tests" / "contract" / "adapters"
VERSIONS = 4
POSITIONS = 16384
"""Of the tiny model: its tokens are letters, and a policy of a world has thousands."""


@dataclass(frozen=True)
class Changed:
    """A run with another environment. text: an answer of the script that does something in it."""

    environment: str
    texts: tuple[str, ...]
    adapter: str = ""
    """The section of its adapter."""


@contextmanager
def ors(folder: Path) -> Iterator[Changed]:
    with OrsServer(folder) as server:
        section = f'[env_gateway.adapters.sums]\nkind = "ors"\nurl = "{server.url}"\n'
        yield Changed("sums", (render("add", {"number": 1}), render("submit", {})), section)


def mcp(_folder: Path) -> Changed:
    command = json.dumps([sys.executable, str(PROGRAMS / "sums_mcp.py")])
    section = f'[env_gateway.adapters.sums]\nkind = "mcp"\ncommand = {command}\ntasks = "sums_tasks:Sums"\n'
    return Changed("sums", (render("add", {"number": 1}), "done"), section)


def reasoning_gym(_folder: Path) -> Changed:
    return Changed("reasoning_gym.chain_sum", tuple(str(number) for number in range(0, 200, 7)))


def retail(_folder: Path) -> Changed:
    return Changed("retail-mini", ("What is your email?", "done", render("deny_request", {"rule": "3"})))


CHANGES = (reasoning_gym, retail, mcp, ors)


@pytest.fixture(params=CHANGES, ids=lambda change: change.__name__)
def changed(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Changed]:
    made = request.param(tmp_path)
    with made if hasattr(made, "__enter__") else nullcontext(made) as found:
        yield found


def with_positions(model: Path, folder: Path) -> Path:
    """Copy the model, with more positions."""
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": POSITIONS}))
    for name in ("tokenizer_config.json", "generation_config.json"):
        values = json.loads((folder / name).read_text())
        for key in ("model_max_length", "max_length"):
            if key in values:
                values[key] = POSITIONS
        (folder / name).write_text(json.dumps(values))
    return folder


def test_a_run_ends_and_balances(changed: Changed, tmp_path: Path, starting_model: Path) -> None:
    model = with_positions(starting_model, tmp_path / "model")
    text = SCRIPTED.format(folder=tmp_path, model=model, versions=VERSIONS, tokens_per_s=5000.0, time_limit_s=600)
    file = tmp_path / "run.toml"
    file.write_text(text + "\n" + changed.adapter)
    process = RunProcess(
        file,
        f"--tasks.environments={{ {json.dumps(changed.environment)} = 1.0 }}",
        f"--rollout.engine.texts={json.dumps(changed.texts)}",
        "--sampling.max_turn_tokens=128",
        f"--sampling.max_trajectory_tokens={POSITIONS}",
        f"--learner.micro_batch_tokens={POSITIONS}",
        "--evaluation.every=2",
        "--evaluation.tasks=4",
        "--evaluation.samples=2",
        environment={"PYTHONPATH": os.pathsep.join((str(PROGRAMS), os.environ.get("PYTHONPATH", "")))},
    )
    code, output = process.finish()
    assert code == 0, output[-4000:]
    home = tmp_path / "scripted"
    ledger = check_ledger(home, samples=4, max_staleness=3)
    lines = evaluation_lines(home)
    print(json.dumps({"environment": changed.environment, "ledger": ledger}))
    print(json.dumps({"rewards": [line["reward"] for line in history(home)], "evaluations": lines}))
    assert len(history(home)) == VERSIONS
    assert [line["trained_versions"] for line in lines] == [0, 2, 4]
    assert all(line["trajectories"]["scored"] == 8 for line in lines)
