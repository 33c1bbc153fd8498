"""A run with several environments, one of them in child processes."""

import json
from collections import defaultdict
from pathlib import Path

import pytest

from palimpsest.common.bus.sqlite import SqliteBus
from palimpsest.common.messages import TRAJECTORIES, TrajectoryFinished, decode
from palimpsest.services.env_gateway.environments import lookup
from palimpsest.services.env_gateway.environments.reasoning_gym_tasks import ReasoningGymTask
from palimpsest.services.env_gateway.environments.tool_calls import render
from palimpsest.services.learner.buffer.task_sampler import task
from tests.runs.run_process import RunProcess, check_ledger, check_whole_groups, history, scripted

pytestmark = pytest.mark.servers
CHAIN_SUM = "reasoning_gym.chain_sum"
VERSIONS = 5
SHARES = {"lookup": 1.0, "hop": 1.0, "add": 1.0, CHAIN_SUM: 3.0}
"""Shares. The slow environment has enough that the others alone cannot fill all versions."""
MADE_VERSIONS = {"lookup": "1", "hop": "1", "add": "1", CHAIN_SUM: ReasoningGymTask.version}
FLAG = "--tasks.environments={" + ", ".join(f'"{name}" = {share}' for name, share in SHARES.items()) + "}"

CALLS = [*(render("lookup", {"key": key}) for key in lookup.KEYS), render("calculator", {"expression": "3 + 4"})]
TEXTS = f"--rollout.engine.texts={json.dumps([*CALLS, '7'])}"


def finished(home: Path) -> dict[str, TrajectoryFinished]:
    """Trajectory id -> record that the workers published."""
    bus = SqliteBus(home / "bus.sqlite")
    found = {}
    with bus.consumer(TRAJECTORIES) as consumer:
        while records := consumer.poll(limit=1000, timeout_s=0):
            for record in records:
                message = decode(TRAJECTORIES, record.body)
                assert isinstance(message, TrajectoryFinished), message
                found[message.trajectory] = message
    bus.close()
    return found


def test_a_run_trains_on_every_environment(tmp_path: Path, starting_model: Path) -> None:
    toml, home = scripted(tmp_path, starting_model, versions=VERSIONS), tmp_path / "scripted"
    run = RunProcess(toml, FLAG, TEXTS, "--sampling.max_trajectory_tokens=400")
    try:
        code, output = run.finish()
    finally:
        run.kill_everything()
    assert code == 0, output[-3000:]
    ledger = check_ledger(home)
    check_whole_groups(ledger, groups=VERSIONS * 4, samples=4)
    assert ledger["dead_lettered"] == 0
    published = finished(home)
    trained = defaultdict(list)
    for line in history(home):
        for group, samples in line["groups"].items():
            for sample in samples:
                trajectory = published[f"{group}/{sample}"]
                assert trajectory.environment == task(0, int(group[1:]), SHARES)[0]
                trained[trajectory.environment].append(trajectory)
    assert set(trained) == set(SHARES)
    for environment, trajectories in trained.items():
        assert {t.environment_version for t in trajectories} == {MADE_VERSIONS[environment]}
        assert all(0 <= t.reward <= 1 for t in trajectories)
        assert all(t.reward == pytest.approx(sum(t.reward_parts.values())) for t in trajectories)
        assert {t.attempt for t in trajectories} == {0}
    assert len({t.reward for t in trained["lookup"]}) > 1
    assert {t.turns for t in trained[CHAIN_SUM]} > {1}  # immediate answers, and answers after the calculator
