"""The end of a vLLM engine, with a stand-in for vLLM's client."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from palimpsest.common.config.schema import VllmEngineConfig
from palimpsest.services.rollout.engine.vllm import VllmEngine


async def test_the_reader_of_the_outputs_ends_before_its_engine(tmp_path: Path) -> None:
    """It would take the end of the engine for a failure, and log it."""
    ended, reads = list[str](), asyncio.Event()

    async def read() -> None:
        reads.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("reader")

    llm: Any = SimpleNamespace(output_handler=asyncio.create_task(read()), shutdown=lambda: ended.append("engine"))
    await reads.wait()
    for at_work in (llm, SimpleNamespace(output_handler=None, shutdown=lambda: ended.append("idle engine"))):
        engine = VllmEngine(VllmEngineConfig(), model="m", max_tokens=8, max_live=1, seed=0, log=tmp_path / "log")
        engine._llm = at_work
        await engine.close()
    assert ended == ["reader", "engine", "idle engine"]
