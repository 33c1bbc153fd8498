"""A run that trains an adapter: it publishes, survives its learner, and its old log-probs are exact."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from palimpsest.common.base_model import base_digest
from palimpsest.common.snapshots.manifest import unseal
from tests.processes.waiting import LIMIT_S
from tests.runs.endless import ENDLESS, end_after_two_versions, kill_a_learner
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
LORA = (
    "--learner.lora.rank=4", "--learner.lora.alpha=8", "--learner.optimizer.lr=1e-3", "--learner.record=true",
    "--learner.checkpoint.keep=1000",
)  # fmt: skip


def rescored(home: Path) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-m", "palimpsest", "rescore", str(home)],
        cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=LIMIT_S, check=True,
    )  # fmt: skip
    compared: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return compared


def test_a_run_with_an_adapter_survives_its_learner(tmp_path: Path, starting_model: Path) -> None:
    base = base_digest(str(starting_model))
    toml, home = scripted(tmp_path, starting_model, versions=1), tmp_path / "scripted"
    run = RunProcess(toml, ENDLESS, *LORA)
    try:
        wait_for(lambda: len(history(home)) >= 2, run, name="version 2")
        kill_a_learner(run)
        versions = end_after_two_versions(run, home)
        code, output = run.finish()
    finally:
        run.kill_everything()
    assert code == 0, output[-3000:]
    check_whole_groups(check_ledger(home), groups=versions * 4, samples=4)
    assert [line["exact"] for line in history(home)] == [True] * versions
    assert base_digest(str(starting_model)) == base, "the base is never written"

    manifests = [unseal(file.read_bytes()) for file in sorted((home / "snapshots" / "versions").glob("*.json"))]
    assert {each.adapter.base for each in manifests} == {base}
    assert len({each.digest for each in manifests}) == len(manifests)
    assert all(".lora_" in entry.name for each in manifests for entry in each.tensors)
    assert newest_manifest(home)["adapter"]["base"] == base

    compared = rescored(home)
    assert compared["versions"] > 1
    assert compared["same_layout_tokens"] > 0
    assert compared["same_layout_unequal"] == 0


@pytest.mark.long
@pytest.mark.parametrize("kind", ["replica", "interruption", "ewma_prox", "ppo_ewma_async"])
def test_every_other_route_works_with_an_adapter(kind: str, tmp_path: Path, starting_model: Path) -> None:
    toml, home = scripted(tmp_path, starting_model, versions=4), tmp_path / "scripted"
    exact = kind in ("replica", "interruption")
    audit = () if exact else ("--learner.audit.fraction=1.0",)
    code, output = RunProcess(toml, f"--learner.proximal.kind={kind}", *LORA, *audit).finish()
    assert code == 0, output[-3000:]
    lines = history(home)
    assert [line["exact"] for line in lines] == [exact] * 4
    if exact:
        compared = rescored(home)
        assert compared["tokens"] > 0
        assert compared["alone_max_abs"] < 0.05
        assert compared["same_layout_unequal"] == 0
