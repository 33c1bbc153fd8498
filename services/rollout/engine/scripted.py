"""An engine without a model: every message is one of a list of texts, emitted token by token at a steady pace.

The text and its log-probs depend only on the request's name, so a run is reproducible. Versions, pauses and spans are
real; only the sampling is scripted.
"""

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

import numpy as np

from palimpsest.common import failpoints
from palimpsest.common.config.engines import ScriptedEngineConfig
from palimpsest.common.routes import RouteShape
from palimpsest.common.snapshots.manifest import Manifest
from palimpsest.common.versions import Version
from palimpsest.services.rollout.engine.port import EngineFailed, SampledTokens, Span, StoredWeights


class ScriptedEngine:
    """See port.py. `encode` converts a text to tokens."""

    def __init__(
        self, config: ScriptedEngineConfig, *, encode: Callable[[str], list[int]], routes: RouteShape | None = None
    ) -> None:
        """routes: sizes of the model whose experts it returns; None: it returns none."""
        self._config, self._encode, self._routes = config, encode, routes
        self._loaded: Manifest | None = None
        self._running = asyncio.Event()
        self._running.set()
        self._closed = self.asleep = False
        self._live: dict[str, _Message] = {}

    def status(self) -> dict[str, str]:
        return {"kind": "scripted"}

    async def start(self) -> None: ...

    async def watch(self) -> NoReturn:
        await asyncio.Future()
        raise AssertionError("nothing ends this future")

    async def generate(
        self, prompt: Sequence[int], *, request: str, temperature: float, max_tokens: int, stop: Sequence[int]
    ) -> SampledTokens:
        draw = hashlib.sha256(request.rpartition("#")[0].encode()).digest()  # the same for every attempt
        text = self._config.texts[draw[0] % len(self._config.texts)]
        ending = list(stop[:1])
        script = (self._encode(text) + ending)[:max_tokens]
        message = self._live[request] = _Message(
            tuple(script),
            tuple(-(1 + draw[i % len(draw)]) / 256 for i in range(len(script))),
            None if self._routes is None else _routes((*prompt, *script), self._routes),
            len(prompt),
        )
        try:
            for _ in script:
                await asyncio.sleep(1 / self._config.tokens_per_s)
                while not self._running.is_set():  # it may be paused again before a waiter gets its turn
                    await self._running.wait()
                self._sample(request, message)
        finally:
            del self._live[request]
        return message.to_sampled_tokens(stopped=bool(ending) and script[-1:] == ending)

    def _sample(self, request: str, message: "_Message") -> None:
        """Sample the message's next token."""
        if self._closed or self._loaded is None:
            raise EngineFailed(f"request {request}: the engine {'is closed' if self._closed else 'has no weights'}")
        message.versions.append(self._loaded.version)

    async def pause(self) -> None:
        self._running.clear()

    async def partial(self, request: str) -> SampledTokens | None:
        if self._running.is_set():
            raise EngineFailed("partial: pause the engine first")
        message = self._live.get(request)
        return message.to_sampled_tokens(stopped=False) if message is not None and message.versions else None

    async def sleep(self) -> None:
        if self._running.is_set():
            raise EngineFailed("sleep: pause the engine first")
        self.asleep = True

    async def load(self, weights: StoredWeights) -> None:
        if self._running.is_set():
            raise EngineFailed("load: pause the engine first")
        self._loaded = weights.manifest

    async def resume(self) -> None:
        self.asleep = False
        self._running.set()

    async def score(self, tokens: Sequence[int]) -> list[float]:
        if self.asleep:
            raise EngineFailed("score: the engine sleeps")
        off = 0.5 if failpoints.active("rollout.scripted_canary") else 0.0
        known = {
            position: logprob
            for canary in (self._loaded.canaries if self._loaded is not None else ())
            if canary.tokens == tuple(tokens)  # canaries with the same tokens may have different positions
            for position, logprob in zip(canary.positions, canary.logprobs, strict=True)
        }
        if not known:
            raise EngineFailed("the scripted engine can score only the canaries of its version")
        return [known.get(position, 0.0) - off for position in range(1, len(tokens))]

    async def close(self) -> None:
        self._closed = True
        self._running.set()


@dataclass
class _Message:
    """A message in flight."""

    script: tuple[int, ...]
    logprobs: tuple[float, ...]
    routes: "np.ndarray | None" = None
    """Of prompt and message; see SampledTokens."""
    prompt: int = 0
    """Tokens of the prompt."""
    versions: list[Version] = field(default_factory=list)
    """Versions of the tokens sampled so far."""

    def to_sampled_tokens(self, *, stopped: bool) -> SampledTokens:
        """Return the tokens sampled so far."""
        length = len(self.versions)
        return SampledTokens(
            self.script[:length],
            self.logprobs[:length],
            _spans(self.versions),
            stopped=stopped,
            routes=None if self.routes is None else self.routes[: self.prompt + length - 1],
        )


def _routes(tokens: Sequence[int], shape: RouteShape) -> "np.ndarray":
    """Return experts that follow from each token alone: different ones for a token, in each layer."""
    places = np.arange(shape.layers)[:, None] + np.arange(shape.of_token)
    return ((np.array(tokens)[:, None, None] + places) % shape.experts).astype(shape.number)


def _spans(versions: Sequence[Version]) -> tuple[Span, ...]:
    """Return the runs of equal versions.

    >>> [(s.version, s.start, s.stop) for s in _spans([Version(3), Version(3), Version(4)])]
    [(3, 0, 2), (4, 2, 3)]
    """
    spans: list[Span] = []
    for i, version in enumerate(versions):
        if spans and spans[-1].version == version:
            spans[-1] = Span(version, spans[-1].start, i + 1)
        else:
            spans.append(Span(version, i, i + 1))
    return tuple(spans)
