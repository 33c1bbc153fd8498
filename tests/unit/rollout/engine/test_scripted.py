"""Engine behavior that cuts rely on: a paused engine samples nothing and reports partial messages."""

import asyncio
from pathlib import Path

import pytest

from palimpsest.common.config.engines import ScriptedEngineConfig
from palimpsest.common.snapshots.manifest import SCHEMA, Canary, Manifest
from palimpsest.common.versions import Version
from palimpsest.services.rollout.engine.port import EngineFailed, SampledTokens, Span, StoredWeights
from palimpsest.services.rollout.engine.scripted import ScriptedEngine

WORDS = tuple(range(100, 120))


def weights(version: int, *canaries: Canary) -> StoredWeights:
    manifest = Manifest(
        schema=SCHEMA, run="test", writer=1, version=Version(version), digest="", encoding="base", object="",
        object_size=0, tensors=(), canaries=canaries,
    )  # fmt: skip
    return StoredWeights(manifest, Path())


class Stepped(ScriptedEngine):
    """An engine that signals each sampled token."""

    def __init__(self) -> None:
        config = ScriptedEngineConfig(kind="scripted", texts=("text",), tokens_per_s=1e6)
        super().__init__(config, encode=lambda _: list(WORDS))
        self.sampled = 0

    def _sample(self, request: str, message: object) -> None:
        super()._sample(request, message)
        self.sampled += 1

    async def until(self, tokens: int) -> None:
        while self.sampled < tokens:
            await asyncio.sleep(0)

    async def update(self, version: int) -> None:
        await self.pause()
        await self.load(weights(version))
        await self.resume()


def start_request(engine: ScriptedEngine, request: str = "g000000/0#0.0") -> "asyncio.Task[SampledTokens]":
    return asyncio.create_task(engine.generate([1], request=request, temperature=1.0, max_tokens=64, stop=[2]))


async def test_an_engine_sleeps_only_while_paused_and_serves_again_after_resume() -> None:
    engine = Stepped()
    await engine.update(3)
    with pytest.raises(EngineFailed, match="pause the engine first"):
        await engine.sleep()
    saying = start_request(engine)
    await engine.until(4)
    await engine.pause()
    await engine.sleep()
    with pytest.raises(EngineFailed, match="the engine sleeps"):
        await engine.score([1, 2])
    partial = await engine.partial("g000000/0#0.0")
    assert partial is not None
    await engine.load(weights(5))
    assert engine.asleep
    await engine.resume()
    sampled = await saying
    assert sampled.tokens[: len(partial.tokens)] == partial.tokens
    assert [span.version for span in sampled.spans] == [3, 5]


async def test_a_partial_message_is_reported_exactly() -> None:
    engine = Stepped()
    await engine.update(3)
    saying = start_request(engine)
    await engine.until(4)
    await engine.update(5)
    await engine.until(9)
    await engine.pause()
    partial, count = await engine.partial("g000000/0#0.0"), engine.sampled
    assert partial is not None
    assert (partial.tokens, partial.stopped) == (WORDS[:count], False)
    assert partial.spans == (Span(Version(3), 0, 4), Span(Version(5), 4, count))
    for _ in range(20):
        await asyncio.sleep(0)
    assert await engine.partial("g000000/0#0.0") == partial  # no token was sampled since
    await engine.resume()
    whole = await saying
    assert (whole.tokens[:count], whole.logprobs[:count]) == (partial.tokens, partial.logprobs)
    assert (whole.tokens, whole.stopped) == ((*WORDS, 2), True)


async def test_messages_that_have_not_begun_or_are_complete_are_not_partial() -> None:
    engine = Stepped()
    await engine.update(0)
    await engine.pause()
    begun = start_request(engine, "g000000/0#0.1")
    await asyncio.sleep(0)
    assert await engine.partial("g000000/0#0.1") is None
    assert await engine.partial("unknown") is None
    await engine.resume()
    await begun
    await engine.pause()
    assert await engine.partial("g000000/0#0.1") is None


async def test_a_cancelled_message_is_discarded() -> None:
    engine = Stepped()
    await engine.update(0)
    saying = start_request(engine)
    await engine.until(3)
    saying.cancel()
    await asyncio.gather(saying, return_exceptions=True)
    await engine.pause()
    assert await engine.partial("g000000/0#0.0") is None


async def test_partial_messages_are_available_only_while_paused() -> None:
    engine = Stepped()
    await engine.update(0)
    with pytest.raises(EngineFailed, match="pause the engine first"):
        await engine.partial("g000000/0#0.0")


async def test_a_waiting_request_samples_nothing_if_the_engine_pauses_again_at_once() -> None:
    engine = Stepped()
    await engine.update(0)
    saying = start_request(engine)
    await engine.until(3)
    await engine.pause()
    for _ in range(5):
        await asyncio.sleep(0)
    count = engine.sampled
    await engine.resume()
    await engine.pause()
    for _ in range(20):
        await asyncio.sleep(0)
    assert engine.sampled == count
    saying.cancel()


async def test_canaries_with_the_same_tokens_and_other_positions_are_all_scored() -> None:
    engine = Stepped()
    await engine.pause()
    await engine.load(weights(0, Canary((7, 8, 9), (1,), (-1.0,), ()), Canary((7, 8, 9), (2,), (-2.0,), ())))
    assert await engine.score((7, 8, 9)) == [-1.0, -2.0]
