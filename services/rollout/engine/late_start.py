"""An engine that starts with its first version, on GPUs that it shares with the learner by turns.

vLLM takes its share of the memory when it starts, and fails if it finds less. A worker without an engine answers cuts
at once, since it holds nothing. It loads a version only while no cut is open, as every worker, and a cut that is
requested during the load waits for its end. So the engine starts in the engines' turn (docs/decisions/0044).
"""

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import NoReturn

from palimpsest.services.rollout.engine.port import Engine, SampledTokens, StoredWeights
from palimpsest.services.rollout.engine.required import required


class LateStart:
    """See port.py. `start` starts nothing; the first `load` starts the engine, which then is paused."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._starting: asyncio.Task[None] | None = None
        self._started = asyncio.Event()

    def status(self) -> dict[str, str]:
        return self._engine.status()

    async def start(self) -> None: ...

    async def watch(self) -> NoReturn:
        await self._started.wait()
        await self._engine.watch()

    async def generate(
        self, prompt: Sequence[int], *, request: str, temperature: float, max_tokens: int, stop: Sequence[int]
    ) -> SampledTokens:
        return await self._engine.generate(
            prompt, request=request, temperature=temperature, max_tokens=max_tokens, stop=stop
        )

    async def pause(self) -> None:
        if self._started.is_set():
            await self._engine.pause()

    async def partial(self, request: str) -> SampledTokens | None:
        return await self._engine.partial(request) if self._started.is_set() else None

    async def sleep(self) -> None:
        if self._started.is_set():
            await self._engine.sleep()

    async def load(self, weights: StoredWeights) -> None:
        if not self._started.is_set():
            # a start cannot be stopped halfway: `close` waits for it
            self._starting = asyncio.create_task(self._engine.start())
            with required("to start"):
                await asyncio.shield(self._starting)
            self._started.set()
            await self._engine.pause()
        await self._engine.load(weights)

    async def resume(self) -> None:
        if self._started.is_set():
            await self._engine.resume()

    async def score(self, tokens: Sequence[int]) -> list[float]:
        return await self._engine.score(tokens)

    async def close(self) -> None:
        if self._starting is not None:
            with suppress(Exception):  # `load` has raised it, or the worker ends
                await self._starting
        await self._engine.close()
