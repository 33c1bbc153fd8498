"""A vLLM engine alone, with faults that a test switches on."""

import os
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from palimpsest.common import failpoints
from palimpsest.common.config.engines import VllmEngineConfig
from palimpsest.common.snapshots.adapter import Adapter
from palimpsest.services.rollout.engine.port import StoredWeights
from palimpsest.services.rollout.engine.vllm import VllmEngine

LOG = "worker-0.engine.log"


@asynccontextmanager
async def running_engine(
    model: Path, folder: Path, *, max_live: int, faults: str, adapter: Adapter | None = None,
    config: VllmEngineConfig | None = None,
) -> AsyncIterator[VllmEngine]:  # fmt: skip
    """Start an engine, and close it at the end. folder: for its log. faults: value of PALIMPSEST_FAULT, inherited."""
    engine = VllmEngine(
        config or VllmEngineConfig(kv_cache_gib=0.25), model=str(model), max_tokens=256, max_live=max_live, seed=0,
        log=folder / LOG, adapter=adapter,
    )  # fmt: skip
    os.environ[failpoints.VARIABLE] = faults
    try:
        await engine.start()
    finally:
        del os.environ[failpoints.VARIABLE]
    held = weakref.ref(engine._running)
    yield engine
    died = engine._watch is not None and engine._watch.gone.is_set()
    await engine.close()
    assert held() is None or died, "vLLM's destructor prints an error if the interpreter ends before it"


def switched_by_files(folder: Path, *faults: str) -> str:
    """Value of PALIMPSEST_FAULT: a fault of the rollout service is active while the folder has a file of its name."""
    return ",".join(f"rollout.{fault}:{folder / fault}" for fault in faults)


async def update(engine: VllmEngine, weights: StoredWeights) -> None:
    """Load a version as the worker does: pause, load, resume."""
    await engine.pause()
    await engine.load(weights)
    await engine.resume()
