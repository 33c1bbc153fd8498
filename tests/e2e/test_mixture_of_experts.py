"""Updates of a mixture of experts: the CPU engine packs the experts again, and reads them back."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
import torch

from palimpsest.services.rollout.canary import judge
from palimpsest.services.rollout.engine.port import WrongWeights
from palimpsest.services.rollout.engine.vllm import VllmEngine
from tests.learner_parts import families
from tests.learner_parts.models import load, perturb, stored
from tests.runs.vllm_engine import running_engine, switched_by_files, update

pytestmark = [pytest.mark.vllm, pytest.mark.asyncio(loop_scope="module")]
STEP = 0.02
"""Deviation of the noise between two versions; stale experts then show as 0.2 nats."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.build("Qwen3-MoE", tmp_path_factory.mktemp("models") / "qwen3_moe")


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder in which a file switches a fault of the same name on."""
    return tmp_path_factory.mktemp("faults")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(folder: Path, faults: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[VllmEngine]:
    switches = switched_by_files(faults, "skip_experts", "skip_read_back")
    async with running_engine(folder, tmp_path_factory.mktemp("engine"), max_live=8, faults=switches) as engine:
        yield engine


async def accepted(engine: VllmEngine, model: torch.nn.Module, version: int, folder: Path) -> bool:
    """Load the model's weights as this version; return whether the canaries accept it."""
    weights = stored(model, version, folder)
    await update(engine, weights)
    scores = await asyncio.gather(*(engine.score(canary.tokens) for canary in weights.manifest.canaries))
    return judge(scores, weights.manifest.canaries).accepted


async def test_updates_pack_the_experts_again(engine: VllmEngine, folder: Path, faults: Path, tmp_path: Path) -> None:
    model = load(folder)
    for version in range(3):
        if version:
            perturb(model, by=STEP, seed=version)
        assert await accepted(engine, model, version, tmp_path)
    perturb(model, by=STEP, seed=3)
    (faults / "skip_experts").touch()
    (faults / "skip_read_back").touch()
    assert not await accepted(engine, model, 3, tmp_path), "stale experts, seen by the canaries alone"


async def test_the_read_back_refuses_experts_that_were_not_packed_again(
    engine: VllmEngine, folder: Path, faults: Path, tmp_path: Path
) -> None:
    """After a step too small for the canaries. The last test: an engine that refused an update is not used again."""
    for file in faults.iterdir():
        file.unlink()
    model = load(folder)
    assert await accepted(engine, model, 10, tmp_path)
    perturb(model, by=1e-4, seed=10)
    (faults / "skip_experts").touch()
    with pytest.raises(WrongWeights, match=r"experts expert \d w13 computes with other weights"):
        await accepted(engine, model, 11, tmp_path)
