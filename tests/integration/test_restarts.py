"""A learner whose launchers start its ranks again: two launchers that meet at a c10d rendezvous, as two nodes."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest

from palimpsest.common.config import load
from palimpsest.common.files import write
from palimpsest.common.trajectory_limit import resolved_toml
from palimpsest.common.user_error import ExitCode
from palimpsest.control_client import ControlClient
from tests.processes.waiting import LIMIT_S
from tests.runs.endless import send
from tests.runs.run_process import ROOT, check_ledger, check_whole_groups, history, newest_manifest, scripted
from tests.runs.unsupervised import WITHIN_S, Services

pytestmark = [pytest.mark.servers, pytest.mark.long]
NODES = ("node-0", "node-1")
VERSIONS = 8
KILLED = 128 + 9
RARELY = dict.fromkeys(NODES, ("--learner.checkpoint.every=1000",))
"""The ranks write a checkpoint only when they end."""


@pytest.fixture
def begun(tmp_path: Path, starting_model: Path) -> Iterator[Callable[[str], Services]]:
    """Starts store, gateway and worker of a run with this `learner.sharding`."""
    made: list[Services] = []

    def begin(sharding: str) -> Services:
        toml, home = scripted(tmp_path, starting_model, versions=VERSIONS), tmp_path / "scripted"
        keys = (f"--learner.sharding={sharding}", "--learner.record=true")
        resolved = load([str(toml), *keys], os.environ, program="the test").config
        write(home / "run.toml", resolved_toml(resolved).encode())  # as `palimpsest run` would: the audit reads it
        made.append(services := Services(toml, home, *keys))
        services.start("snapshot_store", "snapshot_store")
        services.start("env_gateway", "env_gateway")
        services.start("rollout", "rollout", f"--rollout.port={services.ports['rollout']}")
        services.until(lambda: services.status("snapshot_store").get("waiting_for", "") is None, "the store")
        return services

    yield begin
    for services in made:
        services.end()


def kill_the_rank(services: Services, node: str) -> None:
    """SIGKILL the rank of a node, in a step or between two."""
    services.until(lambda: len(history(services.home)) >= 2, "version 2")
    (rank,) = psutil.Process(services.process(node).pid).children()
    rank.kill()


def check_the_run(services: Services, *, ranks: int) -> None:
    """Assert that the run was completed by its second learner, that nothing is lost, and that all values are exact."""
    manifest = newest_manifest(services.home)
    assert (manifest["trained_versions"], manifest["writer"]) == (VERSIONS, 2)
    shards = {name.split("_")[2] for name in manifest["shards"] if name.startswith("__")}
    assert shards in (set(), {str(rank) for rank in range(ranks)})
    versions = [line["version"] for line in history(services.home)]
    assert len(versions) == len(set(versions)) == VERSIONS
    check_whole_groups(check_ledger(services.home), groups=VERSIONS * 4, samples=4)
    command = [sys.executable, "-m", "palimpsest", "rescore", str(services.home)]
    printed = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=LIMIT_S, check=True).stdout
    compared: dict[str, Any] = json.loads(printed.splitlines()[-1])
    assert compared["same_layout_tokens"] > 0
    assert compared["same_layout_unequal"] == 0


@pytest.mark.parametrize(("node", "sharding"), [("node-0", "full"), ("node-1", "full"), ("node-0", "none")])
def test_the_launchers_start_all_ranks_again_when_one_is_killed(
    node: str, sharding: str, begun: Callable[[str], Services]
) -> None:
    services = begun(sharding)
    services.restarting(NODES)
    kill_the_rank(services, node)
    for name in NODES:
        assert services.process(name).wait(timeout=WITHIN_S) == 0, services.log(name).read_text()[-3000:]
    check_the_run(services, ranks=2)
    lines = [line for name in NODES for line in services.log(name).read_text().splitlines() if "launcher on" in line]
    rank = "was ended by SIGKILL"
    assert any(f"{rank}; the ranks of all nodes start again (restart 1 of 3)" in line for line in lines)
    assert any(f"{rank}; 2 ranks on 2 nodes start again from the committed checkpoint" in line for line in lines)


@pytest.mark.parametrize(("lost", "sharding", "way"), [("node-0", "full", "file"), ("node-1", "none", "tcp")])
def test_the_other_node_continues_when_a_launcher_is_killed(
    lost: str, sharding: str, way: str, begun: Callable[[str], Services]
) -> None:
    """A rendezvous in a file survives every node, one over TCP those that do not serve it: node-0 does."""
    services = begun(sharding)
    services.restarting(NODES, nodes="1:2", store_type=way)
    services.until(lambda: len(history(services.home)) >= 2, "version 2")
    services.kill(lost)
    (left,) = set(NODES) - {lost}
    assert services.process(left).wait(timeout=WITHIN_S) == 0, services.log(left).read_text()[-3000:]
    check_the_run(services, ranks=1)


def test_the_other_node_continues_after_a_checkpoint_when_a_launcher_is_terminated(
    begun: Callable[[str], Services],
) -> None:
    services = begun("full")
    services.restarting(NODES, nodes="1:2", store_type="file")
    services.until(lambda: len(history(services.home)) >= 2, "version 2")
    services.process("node-0").terminate()
    for name, code in (("node-0", ExitCode.INTERRUPTED), ("node-1", ExitCode.DONE)):
        assert services.process(name).wait(timeout=WITHIN_S) == code, services.log(name).read_text()[-3000:]
    check_the_run(services, ranks=1)


def test_the_ranks_start_again_with_a_launcher_that_joins(begun: Callable[[str], Services]) -> None:
    services = begun("full")
    join = services.restarting(NODES[:1], nodes="1:2", flags=RARELY)
    services.until(lambda: len(history(services.home)) >= 2, "version 2")
    with closing(ControlClient(f"http://127.0.0.1:{services.ports['node-0']}")) as learner:
        paused = send(learner, "POST", "/v1/actions/pause", {})["version"]  # so that the run does not end before
        join("node-1")
        line = f"a node joined; 2 ranks on 2 nodes start again from the committed checkpoint of version {paused}"
        services.until(lambda: any(line in services.log(name).read_text() for name in NODES), "the start with node-1")
        services.until(lambda: bool(services.status("node-0").get("paused")), "the new learner")
        learner.send("POST", "/v1/actions/resume", json={})
    for name in NODES:
        assert services.process(name).wait(timeout=WITHIN_S) == 0, services.log(name).read_text()[-3000:]
    check_the_run(services, ranks=2)


def test_all_launchers_end_after_a_checkpoint_when_one_that_is_needed_is_terminated(
    begun: Callable[[str], Services],
) -> None:
    services = begun("full")
    services.restarting(NODES, flags=RARELY)
    services.until(lambda: len(history(services.home)) >= 2, "version 2")
    services.process("node-1").terminate()
    for name in NODES:
        assert services.forget(name) == ExitCode.INTERRUPTED, services.log(name).read_text()[-3000:]
    assert newest_manifest(services.home)["trained_versions"] == len(history(services.home))


@pytest.mark.parametrize("terminated", NODES)
def test_no_launcher_waits_for_one_that_is_terminated_while_the_ranks_start_again(
    terminated: str, begun: Callable[[str], Services]
) -> None:
    """node-1 is suspended, so that node-0 waits for it in the rendezvous."""
    services = begun("full")
    services.restarting(NODES)
    services.until(lambda: len(history(services.home)) >= 2, "version 2")
    late = psutil.Process(services.process("node-1").pid)
    late.suspend()
    kill_the_rank(services, "node-0")
    services.until(lambda: "(restart 1 of 3)" in services.log("node-0").read_text(), "the restart")
    services.process(terminated).terminate()
    late.resume()
    for name in NODES:
        assert services.forget(name) == ExitCode.INTERRUPTED, services.log(name).read_text()[-3000:]
    (other,) = set(NODES) - {terminated}
    assert "1 of 2 nodes received a signal to end; the run was stopped" in services.log(other).read_text()


def test_all_launchers_end_with_the_code_of_a_killed_rank_when_no_restart_is_left(
    begun: Callable[[str], Services],
) -> None:
    services = begun("full")
    services.restarting(NODES, restarts=0)
    kill_the_rank(services, "node-1")
    for name in NODES:
        assert services.forget(name) == KILLED, services.log(name).read_text()[-3000:]
        assert "was ended by SIGKILL; all 0 restarts of --max-restarts are used up" in services.log(name).read_text()


def test_the_launcher_that_is_left_says_that_the_rendezvous_is_gone(begun: Callable[[str], Services]) -> None:
    services = begun("full")
    services.restarting(NODES, nodes="1:2")
    services.until(lambda: len(history(services.home)) >= 2, "version 2")
    services.kill("node-0")
    assert services.forget("node-1") == ExitCode.UNAVAILABLE
    assert "the node that serves it has ended. Start the launchers" in services.log("node-1").read_text()


def test_a_run_that_dies_at_the_same_step_again_ends_with_its_code(begun: Callable[[str], Services]) -> None:
    services = begun("full")
    services.restarting(NODES, fault="learner.after_step", restarts=9)
    for name in NODES:
        assert services.forget(name) == KILLED
        assert "the run died 3 times in the same way since its start" in services.log(name).read_text()


@pytest.mark.parametrize(
    ("flags", "cause"),
    [
        ({"node-1": ("--learner.optimizer.lr=0.5",)}, "learner.optimizer.lr is 0.5, not"),
        (
            dict.fromkeys(NODES, ("--learner.context_parallel=3", "--learner.layout=packed", "--model.attention=sdpa")),
            "learner.context_parallel is 3, but the learner has 2 ranks",
        ),
    ],
)
def test_an_error_of_the_configuration_ends_all_launchers_without_a_restart(
    flags: dict[str, tuple[str, ...]], cause: str, begun: Callable[[str], Services]
) -> None:
    services = begun("full")
    services.restarting(NODES, flags=flags)
    for name in NODES:
        assert services.forget(name) == ExitCode.CONFIGURATION
        log = services.log(name).read_text()
        assert cause in log
        assert "start again" not in log
