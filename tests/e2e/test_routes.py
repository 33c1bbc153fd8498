"""Every route to old log-probs and every surrogate, each in a short run on the real engine with the same seed."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.runs import RunProcess, check_ledger, history
from tools.rescore import Models, rescore

pytestmark = [pytest.mark.vllm, pytest.mark.servers]
VERSIONS = 5
GROUPS = 2
SAMPLES = 8
EXACT = ("snapshot", "replica", "interruption")
SURROGATES = (
    "bypass", "current_recompute", "interp_prox_loglinear", "linear_prox", "ewma_prox", "ppo_ewma_async",
)  # fmt: skip
AT_ONCE = 2
"""Runs side by side: an engine's start leaves half of the machine idle."""


@pytest.fixture(scope="module")
def homes(tmp_path_factory: pytest.TempPathFactory, starting_model: Path) -> dict[str, Path]:
    """Kind of proximal -> its run's folder; recorded, with every version kept, and a tool that outlives versions."""
    folder = tmp_path_factory.mktemp("routes")

    def run(kind: str) -> tuple[int, str]:
        audit = ["--learner.audit.fraction=1.0"] if kind in SURROGATES else []
        process = RunProcess(
            "examples/embedded.toml",
            f"--run.folder={folder}",
            f"--run.id={kind}",
            f"--model.path={starting_model}",
            f"--learner.versions={VERSIONS}",
            f"--learner.groups_per_batch={GROUPS}",
            f"--learner.proximal.kind={kind}",
            '--env_gateway.plugins={slow_lookup = "tests.slow_lookup:SlowLookup"}',
            "--tasks.environments={slow_lookup = 1.0}",
            "--learner.record=true",
            "--learner.checkpoint.keep=1000",
            *audit,
        )
        return process.finish(within_s=600)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        outcomes = dict(zip((*EXACT, *SURROGATES), pool.map(run, (*EXACT, *SURROGATES)), strict=True))
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
    assert seen["tokens"] > 300
    assert seen["versions"] > 1
    assert seen["alone_max_abs"] <= 2e-3
    if kind == "snapshot":
        assert seen["same_layout_unequal"] == 0
    if kind != "interruption":  # there, whoever stops late is left out
        assert seen["tokens"] == sum(line["tokens"] for line in lines)
    assert sum(line["multi_version"] for line in lines) > 0


@pytest.mark.parametrize("kind", [*EXACT, *SURROGATES])
def test_every_trajectory_is_accounted_for(kind: str, homes: dict[str, Path]) -> None:
    ledger = check_ledger(homes[kind], samples=SAMPLES)
    assert set(ledger["dropped"]) <= {"over_staleness"}
    assert ledger["trained"] + ledger["dropped"].get("over_staleness", 0) >= VERSIONS * GROUPS * SAMPLES


@pytest.mark.parametrize("kind", SURROGATES)
def test_a_surrogate_is_never_called_exact(kind: str, homes: dict[str, Path]) -> None:
    for line in history(homes[kind]):
        assert (line["exact"], line["proximal"]) == (False, kind)


def test_bypass_sees_no_discrepancy(homes: dict[str, Path]) -> None:
    for line in history(homes["bypass"]):
        assert line["all"]["log_discrepancy_abs"] == 0.0


def test_current_recompute_leaves_the_clip_nothing_to_do(homes: dict[str, Path]) -> None:
    """One optimizer step a version: the anchor is the policy itself, at every staleness."""
    for line in history(homes["current_recompute"]):
        assert line["all"]["log_staleness_ratio_abs"] < 1e-4
        assert line["all"]["clipped"] == 0.0
