"""What a worker needs of an inference engine. One contract suite runs on every adapter."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, Protocol

from palimpsest.common.snapshots.manifest import Manifest
from palimpsest.common.versions import Version


@dataclass(frozen=True, slots=True)
class Span:
    """Sampled tokens [start, stop) that one version sampled."""

    version: Version
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class SampledTokens:
    """One model message, as sampled."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    """log mu of each token at the sampling temperature, by the engine, while sampling; nats."""
    spans: tuple[Span, ...]
    """Cover the tokens exactly, in order."""
    stopped: bool
    """Whether the model ended its message, rather than a length limit."""


@dataclass(frozen=True, slots=True)
class StoredWeights:
    """A version's tensors in a local file: raw bytes, one after another in the manifest's order."""

    manifest: Manifest
    path: Path


class EngineFailed(Exception):
    """The engine lives and could not do one thing: a request, or a step that its worker needs (engine_needs.py)."""


class EngineDead(Exception):
    """The engine is gone, and all it had under way with it. The text says what it died of and what to try."""


class Engine(Protocol):
    """Samples tokens under one version at a time; versions change while requests live.

    Every method but `close` raises EngineDead when the engine is gone.
    """

    def status(self) -> dict[str, str]:
        """For /v1/status, also before the start: its `kind`, and what it has decided about this machine."""

    async def start(self) -> None:
        """Load the model; minutes for a large one. Raises UserError when the model cannot be served, EngineFailed."""

    async def watch(self) -> NoReturn:
        """Wait until the engine is gone, also while nobody asks anything of it, and raise EngineDead."""

    async def generate(
        self, prompt: Sequence[int], *, request: str, temperature: float, max_tokens: int, stop: Sequence[int]
    ) -> SampledTokens:
        """Continue the prompt until a stop token or max_tokens. Requests in flight survive updates.

        Raises EngineFailed. Cancelling gives the request up.
        """

    async def pause(self) -> None:
        """Stop sampling; live requests wait. On return no token is under way. Pausing twice is pausing once."""

    async def partial(self, request: str) -> SampledTokens | None:
        """All that was sampled so far for a request that `generate` has not returned yet. Only while paused.

        `generate` returns these tokens again, first of all. None: nothing was sampled, or no such request is under way.
        """

    async def load(self, weights: StoredWeights) -> None:
        """Take on these weights and forget every cached key and value. Only while paused. Raises EngineFailed."""

    async def resume(self) -> None:
        """Go on; live requests recompute their prefix under the new weights."""

    async def score(self, tokens: Sequence[int]) -> list[float]:
        """log mu(tokens[i + 1] | tokens[: i + 1]) at temperature 1: one fewer than tokens. Raises EngineFailed."""

    async def close(self) -> None:
        """Give everything up."""
