"""A run whose policy is split over its ranks trains, publishes and resumes, also on another number of ranks."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes.waiting import LIMIT_S
from tests.runs.endless import ENDLESS, kill_a_learner, stop_after_two_versions
from tests.runs.run_process import (
    ROOT,
    RunProcess,
    check_ledger,
    check_whole_groups,
    history,
    newest_manifest,
    scripted,
    wait_for,
)

pytestmark = pytest.mark.servers
KEPT = ("--learner.sharding=full", "--learner.record=true", "--learner.checkpoint.keep=1000")
PACKED = ("--learner.layout=packed", "--model.attention=sdpa", "--learner.activation_checkpointing=true")


def test_a_sharded_run_survives_a_rank_and_continues_on_one_rank(tmp_path: Path, starting_model: Path) -> None:
    toml, home = scripted(tmp_path, starting_model, versions=1), tmp_path / "scripted"
    run = RunProcess(toml, ENDLESS, "--local.learner_ranks=2", *KEPT, *PACKED)
    try:
        wait_for(lambda: len(history(home)) >= 2, run, name="version 2")
        kill_a_learner(run, ranks=2)
        first = stop_after_two_versions(run, home)
    finally:
        run.kill_everything()
    shards = newest_manifest(home)["shards"]
    assert {name.split("_")[2] for name in shards if name.startswith("__")} == {"0", "1"}

    versions = first + 2
    more = f"--learner.versions={versions}"
    code, output = RunProcess(toml, "--resume", home, more, *KEPT, *PACKED).finish()
    assert code == 0, output[-3000:]
    assert {name.split("_")[2] for name in newest_manifest(home)["shards"] if name.startswith("__")} == {"0"}
    assert newest_manifest(home)["optimizer_steps"] >= first
    ledger = check_ledger(home)
    check_whole_groups(ledger, groups=versions * 4, samples=4)
    lines = history(home)
    assert len(lines) == versions
    assert all(line["exact"] and line["skipped"] == 0 for line in lines)

    shown = lines_of("store", "show", str(home), "4")
    assert sum(line.startswith("object ") for line in shown) == 2, "a part of each rank"
    compared = json.loads(lines_of("rescore", str(home))[-1])
    assert compared["versions"] > 1
    assert compared["same_layout_tokens"] > 0
    assert compared["same_layout_unequal"] == 0


def test_a_run_with_shards_is_not_continued_without_them(tmp_path: Path, starting_model: Path) -> None:
    toml, home = scripted(tmp_path, starting_model, versions=1), tmp_path / "scripted"
    code, output = RunProcess(toml, "--learner.sharding=full").finish()
    assert code == 0, output[-3000:]
    saved = (home / "run.toml").read_bytes()
    code, output = RunProcess(toml, "--resume", home, "--learner.versions=2", "--learner.sharding=none").finish()
    assert code != 0
    assert (home / "run.toml").read_bytes() == saved, "a refused configuration is not that of the run"
    assert 'was written with sharding: continue the run with learner.sharding = "full"' in output


def lines_of(*words: str) -> list[str]:
    """Lines that a command prints. It must succeed."""
    command = [sys.executable, "-m", "palimpsest", *words]
    return subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=LIMIT_S, check=True
    ).stdout.splitlines()


@pytest.mark.long
@pytest.mark.parametrize("place", ["after_shards", "after_encoding", "after_storing_object", "before_announcing"])
def test_a_sharded_run_survives_a_rank_that_dies_at(place: str, tmp_path: Path, starting_model: Path) -> None:
    """test_sharded_faults.py has the failpoints of a learner that publishes inline."""
    toml, home = scripted(tmp_path, starting_model, versions=4), tmp_path / "scripted"
    marker = tmp_path / "it happened"
    fault = {"PALIMPSEST_FAULT": f"learner.{place}:2", "PALIMPSEST_FAULT_ONCE": str(marker)}
    keys = ("--local.learner_ranks=2", "--learner.publishing=background", *KEPT)
    code, output = RunProcess(toml, *keys, environment=fault).finish()
    assert code == 0, output[-3000:]
    assert marker.exists()
    check_whole_groups(check_ledger(home), groups=4 * 4, samples=4)
    assert len(history(home)) == 4
    assert newest_manifest(home)["shards"]
    verified = lines_of("store", "verify", str(home))
    assert verified == [f"version {version}: every digest is right" for version in range(5)]
    assert json.loads(lines_of("rescore", str(home))[-1])["same_layout_unequal"] == 0
