"""Short runs on the real engine, one per exact route to old log-probs, with the same seed.

Each run has a tool that waits for versions, and ends after it has trained on a trajectory of several versions.
Surrogates: integration/test_surrogate_runs.py.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from palimpsest.rescore import Models, rescore
from tests.processes.waiting import LIMIT_S
from tests.runs import held_lookup
from tests.runs.endless import ENDLESS, end_after_two_versions, several_versions
from tests.runs.run_process import RunProcess, check_ledger, check_whole_groups, history, wait_for

pytestmark = [pytest.mark.vllm, pytest.mark.servers]
GROUPS = 2
SAMPLES = 8
EXACT = ("snapshot", "replica", "interruption")
AT_ONCE = 2
"""Concurrent runs: the start of an engine leaves half of the machine idle."""


@pytest.fixture(scope="module")
def homes(tmp_path_factory: pytest.TempPathFactory, starting_model: Path) -> dict[str, Path]:
    """Kind of proximal -> folder of its run, with recorded batches and all versions."""
    folder = tmp_path_factory.mktemp("routes")

    def run(kind: str) -> tuple[int, str]:
        home = folder / kind
        process = RunProcess(
            "examples/embedded.toml",
            f"--run.folder={folder}",
            f"--run.id={kind}",
            f"--model.path={starting_model}",
            ENDLESS,
            f"--learner.groups_per_batch={GROUPS}",
            f"--learner.proximal.kind={kind}",
            *held_lookup.FLAGS,
            "--learner.record=true",
            "--learner.checkpoint.keep=1000",
            environment={held_lookup.VARIABLE: str(home)},
        )
        try:
            wait_for(lambda: several_versions(home), process, name="a trajectory of several versions")
            end_after_two_versions(process, home)
            return process.finish(within_s=LIMIT_S)
        finally:
            process.kill_everything()  # without the end it would train for ever

    with ThreadPoolExecutor(AT_ONCE) as pool:
        outcomes = dict(zip(EXACT, pool.map(run, EXACT), strict=True))
    for kind, (code, output) in outcomes.items():
        assert code == 0, f"{kind}: {output[-4000:]}"
    return {kind: folder / kind for kind in outcomes}


def rescored(home: Path, model: Path) -> dict[str, Any]:
    return rescore(home / "records", Models(home / "snapshots", str(model), "eager"))


@pytest.mark.parametrize("kind", EXACT)
def test_exact_routes_agree_with_plain_transformers(kind: str, homes: dict[str, Path], starting_model: Path) -> None:
    seen = rescored(homes[kind], starting_model)
    lines = history(homes[kind])
    assert all(line["exact"] for line in lines)
    assert seen["versions"] > 1
    assert seen["alone_max_abs"] <= 2e-3
    if kind == "snapshot":
        assert seen["same_layout_unequal"] == 0
    if kind != "interruption":  # a cut ignores workers that answer late
        assert seen["tokens"] == sum(line["tokens"] for line in lines)
    assert several_versions(homes[kind])


@pytest.mark.parametrize("kind", EXACT)
def test_every_trajectory_is_accounted_for(kind: str, homes: dict[str, Path]) -> None:
    groups = len(history(homes[kind])) * GROUPS
    check_whole_groups(check_ledger(homes[kind], samples=SAMPLES), groups=groups, samples=SAMPLES)
