"""The benchmark of the rollout worker, with the scripted engine in place of vLLM."""

from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from bench.rollout import CANARY, RecordedEngine, enlarge, run_worker, stored
from palimpsest.common.config import load
from palimpsest.common.config.engines import ScriptedEngineConfig
from palimpsest.common.environments import lookup
from palimpsest.common.snapshots.manifest import Canary
from palimpsest.services.rollout.chat_renderer import ChatRenderer
from palimpsest.services.rollout.engine.scripted import ScriptedEngine

pytestmark = pytest.mark.thorough


@pytest.mark.parametrize("place", ["in_process", "gateway"])
async def test_the_worker_samples_and_its_requests_can_be_repeated(
    place: str, tmp_path: Path, starting_model: Path
) -> None:
    flags = [f"--model.path={starting_model}", f"--rollout.environments={place}", "--rollout.max_live=16"]
    files = ["examples/embedded.toml", "--run.id=bench", f"--run.folder={tmp_path}", *flags]
    config = load(files, {}, program="test").config
    dialogue = ChatRenderer.load(str(starting_model), {})
    scripted = ScriptedEngineConfig(kind="scripted", texts=tuple(lookup.solution(3)), tokens_per_s=1e5)
    engine = RecordedEngine(ScriptedEngine(scripted, encode=dialogue.encode))  # type: ignore[arg-type]
    canary = Canary(CANARY, tuple(range(1, len(CANARY))), (-1.0,) * (len(CANARY) - 1), ())
    with stored(config, tmp_path / "store", canary) as store:
        sampled = await run_worker(config, tmp_path / "round", engine, dialogue, store, 0.5, "")
    assert sampled.tokens > 0
    assert sampled.rate == sampled.tokens / sampled.seconds
    prompts = {dialogue._tokenizer.decode(prompt) for prompt, _ in engine.requests}
    assert any("What is the value of" in prompt for prompt in prompts)
    assert {longest for _, longest in engine.requests} == {config.sampling.max_turn_tokens}


def test_the_large_model_has_thirty_million_parameters(tmp_path: Path, starting_model: Path) -> None:
    folder = enlarge(starting_model, tmp_path / "large")
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    assert 25e6 < sum(parameter.numel() for parameter in model.parameters()) < 40e6
    assert ChatRenderer.load(str(folder), {}).stop_tokens == ChatRenderer.load(str(starting_model), {}).stop_tokens
