"""Short runs on the real engine, one per exact route to old log-probs, with the same seed.

Surrogates: integration/test_surrogate_runs.py.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from palimpsest.rescore import Models, rescore
from tests.runs.run_process import RunProcess, check_ledger, check_whole_groups, history

pytestmark = [pytest.mark.vllm, pytest.mark.servers]
VERSIONS = 5
GROUPS = 2
SAMPLES = 8
EXACT = ("snapshot", "replica", "interruption")
AT_ONCE = 2
"""Concurrent runs: the start of an engine leaves half of the machine idle."""


@pytest.fixture(scope="module")
def homes(tmp_path_factory: pytest.TempPathFactory, starting_model: Path) -> dict[str, Path]:
    """Kind of proximal -> folder of its run, with recorded batches, all versions, and a tool slower than a version."""
    folder = tmp_path_factory.mktemp("routes")

    def run(kind: str) -> tuple[int, str]:
        process = RunProcess(
            "examples/embedded.toml",
            f"--run.folder={folder}",
            f"--run.id={kind}",
            f"--model.path={starting_model}",
            f"--learner.versions={VERSIONS}",
            f"--learner.groups_per_batch={GROUPS}",
            f"--learner.proximal.kind={kind}",
            '--env_gateway.plugins={slow_lookup = "tests.runs.slow_lookup:SlowLookup"}',
            "--tasks.environments={slow_lookup = 1.0}",
            "--learner.record=true",
            "--learner.checkpoint.keep=1000",
        )
        return process.finish()

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
    assert sum(line["multi_version"] for line in lines) > 0


@pytest.mark.parametrize("kind", EXACT)
def test_every_trajectory_is_accounted_for(kind: str, homes: dict[str, Path]) -> None:
    check_whole_groups(check_ledger(homes[kind], samples=SAMPLES), groups=VERSIONS * GROUPS, samples=SAMPLES)
