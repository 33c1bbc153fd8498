"""A run with several environments, one of them in child processes, which a real Prometheus scrapes."""

import json
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from palimpsest.common.bus.sqlite import SqliteBus
from palimpsest.common.environments import lookup
from palimpsest.common.environments.reasoning_gym_tasks import ReasoningGymTask
from palimpsest.common.environments.tool_calls import render
from palimpsest.common.messages import TRAJECTORIES, TrajectoryFinished, decode
from palimpsest.services.learner.buffer.task_sampler import task
from tests.runs.endless import ENDLESS, end_after_two_versions
from tests.runs.run_process import RunProcess, check_ledger, check_whole_groups, history, scripted, wait_for
from tests.servers.prometheus import Prometheus
from tools import dashboards

pytestmark = pytest.mark.servers
CHAIN_SUM = "reasoning_gym.chain_sum"
VERSIONS = 5
"""Enough versions to train on every environment."""
SHARES = {"lookup": 1.0, "hop": 1.0, "add": 1.0, CHAIN_SUM: 3.0}
"""Shares. The slow environment has enough that the others alone cannot fill all versions."""
MADE_VERSIONS = {"lookup": "1", "hop": "1", "add": "1", CHAIN_SUM: ReasoningGymTask.version}
FLAG = "--tasks.environments={" + ", ".join(f'"{name}" = {share}' for name, share in SHARES.items()) + "}"

CALLS = [*(render("lookup", {"key": key}) for key in lookup.KEYS), render("calculator", {"expression": "3 + 4"})]
SCRAPES = 'count_over_time(palimpsest_learner_phase_seconds_count{phase="train"}[1h])'
MAY_BE_EMPTY = {
    ("Versions", "{{instance}} (replica)"): "no replica",
    ("Tokens scored per second", "replica"): "no replica",
    ("Tokens scored per second", "records of replicas"): "no replica",
    ("Replicas", "{{instance}} waiting"): "no replica",
    ("Replicas", "not scored: {{reason}}"): "no replica",
    ("Loads of old versions per second", "replicas"): "no replica",
    ("Time of a replica", "load"): "no replica",
    ("Time of a replica", "forward pass"): "no replica",
    ("Flushes per second", "{{outcome}}"): "no cuts",
    ("Tokens scored per second", "{{when}}"): "no cuts",
    ("Time of a cut by phase", "{{phase}}"): "no cuts",
    ("Pauses of an engine", "cut: until it pauses"): "no cuts",
    ("Pauses of an engine", "cut: hold"): "no cuts",
    ("Surrogate error", "leak, staleness {{staleness}}"): "no surrogate",
    ("Surrogate error", "{{judged}}"): "no surrogate",
    ("Weights", "capped per second, {{bound}}"): "no bound on the weights",
    ("Slope of the removal", "{{removal}}"): "batches of a single staleness",
    ("Trajectories per second", "{{reason}}"): "no drop",
    ("Changes by people", "{{what}} paused"): "no change by a person",
    ("Changes by people", "{{kind}} per second"): "no change by a person",
    ("Changes by people", "not tracked per second, {{reason}}"): "no tracking",
    ("Held-out tasks", "avg@k {{environment}}"): "no evaluation",
    ("Held-out tasks", "pass@k {{environment}}"): "no evaluation",
    ("Evaluations", "{{end}} per second"): "no evaluation",
    ("Ends in the workers", "{{code}}"): "no fault",
    ("Sessions per second", "{{environment}} limit: {{limit}}"): "no session at a limit",
    ("Messages of agent programs per second", "{{place}}"): "no agent program",
    ("Dead letters", "learner, {{cause}}"): "no fault",
    ("Dead letters", "worker, {{cause}}"): "no fault",
    ("Steps per second", "repeated {{request}}"): "no fault",
    ("Failures per second", "{{environment}} {{code}}"): "no fault",
    ("Failures per second", "{{environment}} refused host"): "no list of hosts",
    ("Refused requests per second", "{{code}}"): "no fault",
    ("Outages", "{{instance}} to {{of}}"): "no fault",
    ("Requests to the store", "refused: {{reason}}"): "no fault",
}
"""Panel and legend of the queries of which this run has no series, or not at every speed, and why."""
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


@dataclass(frozen=True, slots=True)
class FinishedRun:
    home: Path
    versions: int
    empty_queries: set[tuple[str, str]]
    """Panel and legend of the dashboards' queries that gave no point."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, starting_model: Path) -> FinishedRun:
    """A finished run that a Prometheus scraped."""
    folder = tmp_path_factory.mktemp("environments")
    toml, home = scripted(folder, starting_model, versions=1), folder / "scripted"
    process = RunProcess(toml, ENDLESS, FLAG, TEXTS, "--sampling.max_trajectory_tokens=400")
    try:
        wait_for(lambda: "rollout" in process.services(), process, name="the worker")
        (worker,) = process.services()["rollout"]
        with Prometheus(folder / "prometheus", ports_of(worker), run="scripted") as prometheus:
            wait_for(lambda: len(history(home)) >= VERSIONS, process, name=f"version {VERSIONS}")
            wait_for(lambda: prometheus.number(SCRAPES) >= 3, process, name="three scrapes")
            versions = end_after_two_versions(process, home)
            code, output = process.finish()
            assert code == 0, output[-3000:]
            return FinishedRun(home, versions, empty_queries(prometheus))
    finally:
        process.kill_everything()


def ports_of(worker: psutil.Process) -> list[int]:
    """Ports of all services, which the supervisor passes to each worker."""
    return [int(found[1]) for word in worker.cmdline() if (found := re.fullmatch(r"--[a-z_]+\.port=(\d+)", word))]


def shown_queries() -> dict[tuple[str, str], str]:
    """Panel and legend -> query."""
    return {
        (panel.title, legend): query
        for dashboard in dashboards.ALL
        for panel in dashboard.panels
        for legend, query in panel.queries.items()
    }


def empty_queries(prometheus: Prometheus) -> set[tuple[str, str]]:
    return {
        where
        for where, query in shown_queries().items()
        if not prometheus.has_points(query.replace("$__rate_interval", "5m").replace("$run", ".*"))
    }


def test_the_queries_of_the_dashboards_give_points(run: FinishedRun) -> None:
    assert run.empty_queries - MAY_BE_EMPTY.keys() == set()
    assert MAY_BE_EMPTY.keys() <= shown_queries().keys()


def test_the_run_trains_on_every_environment(run: FinishedRun) -> None:
    home = run.home
    ledger = check_ledger(home)
    check_whole_groups(ledger, groups=run.versions * 4, samples=4)
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
