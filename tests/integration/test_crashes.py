"""Runs survive killed processes: the ledger balances and no trajectory is trained twice."""

from pathlib import Path

import psutil
import pytest

from tests.processes.waiting import LIMIT_S
from tests.runs.endless import ENDLESS, end_after_two_versions
from tests.runs.run_process import RunProcess, chaos, check_ledger, history, newest_manifest, scripted, wait_for

pytestmark = pytest.mark.servers
SEED = 20261121


def test_a_run_survives_the_kill_of_every_service_at_a_random_time(tmp_path: Path, starting_model: Path) -> None:
    toml, home = scripted(tmp_path, starting_model, versions=1), tmp_path / "scripted"
    run = RunProcess(toml, ENDLESS, "--local.restarts=20", "--rollout.environments=gateway")
    try:
        schedule = chaos(run, home, seed=SEED, kills=4)
        trained = len(history(home))
        wait_for(
            lambda: len(history(home)) > trained + 3, run, within_s=LIMIT_S, name="three versions after the last kill"
        )
        run.process.terminate()
        code, output = run.finish(within_s=LIMIT_S)
    finally:
        run.kill_everything()
    print("\n".join(schedule))
    assert code == 130, output[-3000:]
    ledger = check_ledger(home)
    assert len(history(home)) >= 7
    assert ledger["trained"] >= 2 * 4 * len(history(home)), "two of each group; the others may have gone stale"


def test_a_run_resumes_after_a_kill_of_all_its_processes(tmp_path: Path, starting_model: Path) -> None:
    toml, home = scripted(tmp_path, starting_model, versions=1), tmp_path / "scripted"
    for versions in (2, 5):
        arguments = (toml,) if versions == 2 else (toml, "--resume", home)
        run = RunProcess(*arguments, ENDLESS)
        try:
            wait_for(lambda n=versions: len(history(home)) >= n, run, within_s=LIMIT_S, name=f"version {versions}")
        finally:
            run.kill_everything()
            run.process.wait()
        check_ledger(home)
    versions = len(history(home)) + 3
    run = RunProcess("--resume", home, f"--learner.versions={versions}")
    code, output = run.finish(within_s=LIMIT_S)
    assert code == 0, output[-3000:]
    check_ledger(home)
    assert len(history(home)) == versions
    assert newest_manifest(home)["trained_versions"] == versions


def test_the_ranks_end_when_their_launcher_is_killed(tmp_path: Path, starting_model: Path) -> None:
    """Otherwise the old ranks would train on while their successor runs: they are not in torchrun's process group."""
    toml, home = scripted(tmp_path, starting_model, versions=1), tmp_path / "scripted"
    run = RunProcess(toml, ENDLESS, "--local.learner_ranks=2")
    try:
        wait_for(lambda: len(history(home)) >= 2, run, within_s=LIMIT_S, name="version 2")
        ranks = run.services()["learner"]
        run.kill("torchrun")
        gone, alive = psutil.wait_procs(ranks, timeout=LIMIT_S)
        assert (len(gone), alive) == (2, [])
        versions = end_after_two_versions(run, home)
        code, output = run.finish(within_s=LIMIT_S)
    finally:
        run.kill_everything()
    assert code == 0, output[-3000:]
    check_ledger(home)
    assert len(history(home)) == versions


def test_a_run_survives_a_learner_that_dies_inside_a_checkpoint(tmp_path: Path, starting_model: Path) -> None:
    """One failpoint with real processes; test_learner_schedules.py tests all of them."""
    toml, home = scripted(tmp_path, starting_model, versions=4), tmp_path / "scripted"
    marker = tmp_path / "it happened"
    fault = {"PALIMPSEST_FAULT": "learner.inside_checkpoint:2", "PALIMPSEST_FAULT_ONCE": str(marker)}
    run = RunProcess(toml, environment=fault)
    code, output = run.finish(within_s=LIMIT_S)
    assert code == 0, output[-3000:]
    check_ledger(home)
    assert len(history(home)) == 4
    assert marker.exists(), "the run did not reach the failpoint"


def test_a_worker_that_always_dies_at_startup_ends_the_run_with_the_cause(tmp_path: Path, starting_model: Path) -> None:
    toml, home = scripted(tmp_path, starting_model, versions=4), tmp_path / "scripted"
    run = RunProcess(toml, "--local.restarts=99", environment={"PALIMPSEST_FAULT": "rollout.start"})
    code, output = run.finish(within_s=LIMIT_S)
    assert code == 1, output
    text = " ".join(output.split())
    assert "! worker-0 was ended by SIGKILL after" in text
    assert "it restarts in 1 s" in text
    assert "worker-0 died 3 times in a row in the same way, before it did any work. It was ended by SIGKILL" in text
    assert f"its log: {home}/logs/worker-0.log" in text
    assert f"-m palimpsest run --resume {home}" in text
