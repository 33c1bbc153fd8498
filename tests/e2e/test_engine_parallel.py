"""One model on two processes of vLLM's CPU engine, as on two GPUs: slices of each layer, and whole experts."""

import asyncio
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio

from palimpsest.common.config.engines import VllmEngineConfig
from palimpsest.services.rollout.canary import judge
from palimpsest.services.rollout.engine.port import StoredWeights, WrongWeights
from palimpsest.services.rollout.engine.vllm import VllmEngine
from tests.learner_parts import families
from tests.learner_parts.models import load, perturb, stored
from tests.runs.vllm_engine import running_engine, switched_by_files, update

pytestmark = [pytest.mark.vllm, pytest.mark.long, pytest.mark.asyncio(loop_scope="module")]
STEP = 0.02
"""Deviation of the noise between two versions; stale weights then show as 0.2 nats."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.build("Qwen3-MoE", tmp_path_factory.mktemp("models") / "qwen3_moe")


@pytest.fixture(scope="module")
def versions(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[StoredWeights]:
    """Three versions: the third differs from the second by less than the canaries can see."""
    model, home, made = load(folder), tmp_path_factory.mktemp("versions"), []
    for version, by in enumerate((0.0, STEP, 1e-4)):
        perturb(model, by=by, seed=version)
        made.append(stored(model, version, home))
    return made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def alone(
    folder: Path, versions: list[StoredWeights], tmp_path_factory: pytest.TempPathFactory
) -> list[list[float]]:
    """Scores of the first version's canaries by an engine of one process."""
    async with running_engine(folder, tmp_path_factory.mktemp("engine"), max_live=8, faults="") as engine:
        await update(engine, versions[0])
        return await scored(engine, versions[0])


async def scored(engine: VllmEngine, weights: StoredWeights) -> list[list[float]]:
    return list(await asyncio.gather(*(engine.score(canary.tokens) for canary in weights.manifest.canaries)))


@pytest.mark.parametrize("experts", [False, True], ids=["slices", "whole-experts"])
async def test_two_processes_compute_and_update_as_one(
    experts: bool, folder: Path, versions: list[StoredWeights], alone: list[list[float]], tmp_path: Path
) -> None:
    config = VllmEngineConfig(kv_cache_gib=0.25, tensor_parallel=2, expert_parallel=experts)
    switches = switched_by_files(tmp_path, "skip_experts")
    sums, found = [], []
    async with running_engine(folder, tmp_path, max_live=8, faults=switches, config=config) as engine:
        for weights in versions[:2]:
            await update(engine, weights)
            sums.append(await engine._running.compute_weight_checksums())
            found.append(await scored(engine, weights))
            verdict = judge(found[-1], weights.manifest.canaries)
            assert verdict.accepted, verdict.reason()
            if not weights.manifest.version:
                assert np.abs(np.subtract(found[0], alone)).mean() <= verdict.tolerance
        assert [before != after for before, after in zip(*sums, strict=True)] == [True, True], (
            "a process is not updated"
        )
        sampled = await engine.generate((5, 6, 7), request="one", temperature=1.0, max_tokens=16, stop=())
        assert [(span.version, span.start, span.stop) for span in sampled.spans] == [(1, 0, 16)]
        (tmp_path / "skip_experts").touch()
        with pytest.raises(WrongWeights, match=r"experts expert \d w13 computes with other weights"):
            await update(engine, versions[2])
