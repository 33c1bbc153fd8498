"""The real engine: log-probs, spans and weight updates against plain transformers."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from common.config.schema import VllmEngineConfig
from services.rollout.canary import judge
from services.rollout.engine import Sampled
from services.rollout.engine_vllm import VllmEngine
from tests.models import load, logprobs, perturb, stored

pytestmark = [pytest.mark.vllm, pytest.mark.asyncio(loop_scope="module")]
STEP = 0.04
"""Deviation of the noise between two test versions: far more than an optimizer step, so that mix-ups show."""
MEAN, MOST = 0.02, 0.2
"""Engine against transformers inside one version, nats a token, both in bf16."""


@pytest.fixture(scope="module", params=["tied", "untied"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue("starting_model" if request.param == "tied" else "untied_model")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(folder: Path) -> AsyncIterator[VllmEngine]:
    engine = VllmEngine(VllmEngineConfig(kv_cache_gib=0.25), model=str(folder), max_tokens=256, max_live=64, seed=0)
    await engine.start()
    yield engine
    await engine.close()


async def sample(engine: VllmEngine, name: str, *, length: int, temperature: float = 1.0) -> tuple[list[int], Sampled]:
    prompt = [(7 * len(name) + 3 * i) % 250 + 3 for i in range(20)]
    return prompt, await engine.generate(prompt, request=name, temperature=temperature, max_tokens=length, stop=())


def errors(model, prompt: list[int], sampled: Sampled, *, temperature: float = 1.0) -> list[float]:
    """|engine - transformers| for each sampled token."""
    exact = logprobs(model, prompt + list(sampled.tokens), temperature)[len(prompt) - 1 :]
    return [abs(a - b) for a, b in zip(sampled.logprobs, exact, strict=True)]


async def test_updates_log_probs_and_spans(engine: VllmEngine, folder: Path, tmp_path: Path) -> None:
    """One story, because an engine takes long to start: versions 0 to 3, the last while requests live."""
    model = load(folder)
    for version in range(3):
        if version:
            perturb(model, by=STEP, seed=version)
        await engine.pause()
        await engine.load(stored(model, version, tmp_path))
        await engine.resume()
        canaries = stored(model, version, tmp_path).manifest.canaries
        scores = [await engine.score(canary.tokens) for canary in canaries]
        assert judge(scores, canaries, tolerance=MEAN).accepted
        for temperature in (1.0, 0.6):
            prompt, sampled = await sample(engine, f"v{version}t{temperature}", length=48, temperature=temperature)
            wrong = errors(model, prompt, sampled, temperature=temperature)
            assert sum(wrong) / len(wrong) < MEAN
            assert max(wrong) < MOST
            assert [(s.version, s.start, s.stop) for s in sampled.spans] == [(version, 0, 48)]
    # temperature is part of the log-prob: the same tokens at another temperature are far off
    prompt, sampled = await sample(engine, "cold", length=48, temperature=0.6)
    assert sum(errors(model, prompt, sampled)) / 48 > 5 * MEAN
    await _update_in_flight(engine, model, folder, tmp_path)


async def _update_in_flight(engine: VllmEngine, model, folder: Path, tmp_path: Path) -> None:
    before = load(folder)
    for version in (1, 2):
        perturb(before, by=STEP, seed=version)
    perturb(model, by=STEP, seed=3)
    live = [asyncio.create_task(sample(engine, f"live{i}", length=200)) for i in range(32)]
    await asyncio.sleep(0.3)
    await engine.pause()
    await engine.load(stored(model, 3, tmp_path))
    await engine.resume()
    results = await asyncio.gather(*live)
    cut = [(prompt, sampled) for prompt, sampled in results if len(sampled.spans) == 2]
    assert len(cut) >= 16, "the update missed the live requests"
    under_old, under_new, mixed_up = [], [], []
    for prompt, sampled in cut:
        first, second = sampled.spans
        assert (first.version, second.version) == (2, 3)
        assert (first.start, first.stop, second.stop) == (0, second.start, 200)
        old, new = errors(before, prompt, sampled), errors(model, prompt, sampled)
        under_old += old[: first.stop]
        under_new += new[first.stop :]
        mixed_up += new[: first.stop] + old[first.stop :]
    assert sum(under_old) / len(under_old) < MEAN
    assert sum(under_new) / len(under_new) < MEAN  # prefix recomputed: no old key is left in it
    assert sum(mixed_up) / len(mixed_up) > 5 * MEAN
