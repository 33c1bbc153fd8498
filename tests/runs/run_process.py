"""Real runs as processes: start, watch and kill them, and check the files that they leave."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil

from palimpsest.services.audit.command import run_command
from tests.processes.waiting import LIMIT_S, LOOK_S

ROOT = Path(__file__).resolve().parents[2]

SCRIPTED = """
[run]
id = "scripted"
folder = "{folder}"

[model]
path = "{model}"
attention = "eager"

[tasks]
environments = {{ lookup = 1.0 }}
samples_per_group = 4
time_limit_s = {time_limit_s}

[sampling]
max_turn_tokens = 8
max_trajectory_tokens = 96
max_turns = 4

[rollout]
max_live = 32

[rollout.engine]
kind = "scripted"
tokens_per_s = {tokens_per_s}
texts = [
    '''<tool_call>
{{"name": "lookup", "arguments": {{"key": "amber"}}}}
</tool_call>''',
    '''<tool_call>
{{"name": "lookup", "arguments": {{"key": "basil"}}}}
</tool_call>''',
    '3',
    '5',
    'what?',
]

[learner]
versions = {versions}
groups_per_batch = 4
max_staleness = 3
canary_trajectories = 4

[learner.optimizer]
lr = 1e-4
"""


def scripted(
    folder: Path, model: Path, *, versions: int, tokens_per_s: float = 500.0, time_limit_s: int = 3600
) -> Path:
    """Write a run file for a run with the scripted engine; all other parts are real."""
    path = folder / "scripted.toml"
    path.write_text(
        SCRIPTED.format(
            folder=folder, model=model, versions=versions, tokens_per_s=tokens_per_s, time_limit_s=time_limit_s
        )
    )
    return path


class RunProcess:
    """`palimpsest run ...` in a separate process group."""

    def __init__(self, *arguments: str | Path, environment: dict[str, str] | None = None) -> None:
        self.started = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "palimpsest", "run", *map(str, arguments)],
            cwd=ROOT,
            env={**os.environ, **(environment or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def finish(self, *, within_s: float = LIMIT_S) -> tuple[int, str]:
        """Wait for the end. Returns exit code and output. After within_s, kill the process group and fail."""
        try:
            output, _ = self.process.communicate(timeout=within_s)
        except subprocess.TimeoutExpired:
            self.kill_everything()
            output, _ = self.process.communicate()
            raise AssertionError(
                f"the run did not end within {within_s:.0f} s; its output:\n{output[-4000:]}"
            ) from None
        return self.process.returncode, output

    def services(self) -> dict[str, list[psutil.Process]]:
        """Service name -> its running processes."""
        found: dict[str, list[psutil.Process]] = {}
        for child in psutil.Process(self.process.pid).children(recursive=True):
            try:
                line = child.cmdline()
            except psutil.Error:
                continue
            for name in ("rollout", "env_gateway", "snapshot_store", "learner.replica", "learner"):
                if f"palimpsest.services.{name}" in line:
                    launcher = "palimpsest.services.learner.torchrun" in line
                    found.setdefault("torchrun" if launcher else name, []).append(child)
        return found

    def kill(self, service: str) -> bool:
        """SIGKILL a service's processes. Returns False if there are none."""
        processes = self.services().get(service, [])
        for process in processes:
            process.kill()
        return bool(processes)

    def kill_everything(self) -> None:
        """SIGKILL the supervisor and all its descendants."""
        try:
            family = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            family = []
        for process in (*family, psutil.Process(self.process.pid) if self.process.poll() is None else None):
            if process is not None and process.is_running():
                process.send_signal(signal.SIGKILL)


def wait_for(what: Callable[[], bool], run: RunProcess, *, name: str, within_s: float = LIMIT_S) -> None:
    """Wait until what() is true. Fails if the run ends before."""
    deadline = time.monotonic() + within_s
    while not what():
        if run.process.poll() is not None:
            if what():  # true at the end of the run
                return
            output, _ = run.process.communicate()
            raise AssertionError(f"the run ended with {run.process.returncode} before {name}:\n{output[-4000:]}")
        assert time.monotonic() < deadline, f"{name} did not happen within {within_s:.0f} s"
        time.sleep(LOOK_S)


def history(home: Path, length: int | None = None) -> list[dict[str, Any]]:
    """Complete lines of history.jsonl, or of its first `length` bytes."""
    path = home / "history.jsonl"
    if not path.exists():
        return []
    text = path.read_bytes()[:length].decode()
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def newest_manifest(home: Path) -> dict[str, Any]:
    """Manifest of the newest complete checkpoint."""
    newest = max(home.glob("checkpoints/*/manifest.json"))
    return json.loads(newest.read_text())


def check_ledger(home: Path, *, samples: int = 4, max_staleness: int = 3) -> dict[str, Any]:
    """Assert that the audit finds no fault. Returns its sums.

    Stricter than the audit in one point: a group must not be offered twice, even with the same task.
    """
    audited = run_command([str(home), "--json"], {})
    report: dict[str, Any] = json.loads(audited.text)
    assert report["findings"] == []
    assert (audited.code, report["sound"]) == (0, True)
    assert (report["samples_per_group"], report["max_staleness"]) == (samples, max_staleness)
    assert report["repeated_offers"] == 0
    assert report["checkpoint"], "the run has no checkpoint"
    sums: dict[str, Any] = report["trajectories"]
    resolved = sums["trained"] + sum(sums["dropped"].values()) + sums["dead_lettered"]
    assert sums["offered"] == resolved + sums["pending"]
    return sums


NEVER_TRAINED = frozenset({"over_staleness", "group_too_small"})
"""Drop reasons without a failure: a trajectory went stale, and the rest of its group is too small."""


def check_whole_groups(ledger: Mapping[str, Any], *, groups: int, samples: int) -> None:
    """Assert that `groups` groups were trained on, complete except for stale trajectories.

    The number of stale trajectories depends on the machine. So this asserts only that each group has at least two
    trained trajectories, that every missing trajectory has a drop, and that no drop reason implies a failure.
    """
    dropped: dict[str, int] = ledger["dropped"]
    assert set(dropped) <= NEVER_TRAINED
    assert 2 * groups <= ledger["trained"] <= groups * samples
    assert groups * samples - ledger["trained"] <= dropped.get("over_staleness", 0)


def chaos(run: RunProcess, home: Path, *, seed: int, kills: int) -> list[str]:
    """Kill services at random times, each after a further version. Returns the schedule."""
    rng = random.Random(seed)
    services = ["learner", "rollout", "env_gateway", "snapshot_store"]
    order = [services[i % len(services)] for i in range(kills)]
    rng.shuffle(order)
    done: list[str] = []
    for service in order:
        trained = len(history(home))
        wait_for(lambda n=trained: len(history(home)) > n, run, name=f"version after {done[-1:]}")
        time.sleep(rng.random())  # a random time within a version
        wait_for(lambda s=service: run.kill(s), run, name=f"a {service} to kill")
        done.append(f"{service} at {trained + 1}")
    return done
