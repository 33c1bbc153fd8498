"""The experts that vLLM returns become part of a message; an engine that cannot return them is refused."""

from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest

from palimpsest.common.config.engines import VllmEngineConfig
from palimpsest.common.user_error import UserError
from palimpsest.services.rollout.engine import machine
from palimpsest.services.rollout.engine.amx import Amx
from palimpsest.services.rollout.engine.vllm import VllmEngine
from palimpsest.services.rollout.engine.vllm_outputs import to_sampled_tokens


async def test_the_cpu_engine_is_refused(tmp_path: Path) -> None:
    engine = VllmEngine(
        VllmEngineConfig(), model="none", max_tokens=8, max_live=1, seed=0, log=tmp_path / "log", routes=True
    )
    with (
        patch.object(machine, "set_environment", return_value=next(iter(Amx))),
        pytest.raises(UserError, match="vLLM's CPU engine does not return the experts that it chose"),
    ):
        await engine.start()


async def test_the_cpu_engine_cannot_sleep(tmp_path: Path) -> None:
    config = VllmEngineConfig(sleep=True)
    engine = VllmEngine(config, model="none", max_tokens=8, max_live=1, seed=0, log=tmp_path / "log")
    with (
        patch.object(machine, "set_environment", return_value=next(iter(Amx))),
        pytest.raises(UserError, match="vLLM's CPU engine cannot sleep: it keeps its memory"),
    ):
        await engine.start()


def test_experts_of_an_output_are_those_of_the_message() -> None:
    routes = np.arange(12, dtype=np.uint8).reshape(3, 2, 2)
    output = SimpleNamespace(
        token_ids=(5, 6),
        logprobs=[{5: SimpleNamespace(logprob=-1.0)}, {6: SimpleNamespace(logprob=-2.0)}],
        weight_versions=(SimpleNamespace(version="3", start=0, end=2),),
        finish_reason="stop",
        routed_experts=routes,
    )
    sampled = to_sampled_tokens(SimpleNamespace(outputs=[output]))
    assert sampled.tokens == (5, 6)
    assert sampled.routes is routes
