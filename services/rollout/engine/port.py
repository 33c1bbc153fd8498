"""The port of inference engines. One contract suite runs on every adapter."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, Protocol

import numpy as np
from numpy.typing import NDArray

from palimpsest.common.snapshots.manifest import Manifest
from palimpsest.common.versions import Version


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens [start, stop) of a message that one version sampled."""

    version: Version
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class SampledTokens:
    """One model message with its log-probs and versions."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    """log mu of each token at the sampling temperature, measured by the engine while sampling; nats."""
    spans: tuple[Span, ...]
    """Cover the tokens exactly, in order."""
    stopped: bool
    """Whether the model ended its message, rather than a length limit."""
    routes: "NDArray[np.uint8] | NDArray[np.uint16] | None" = None
    """Experts of each position but the last, of prompt and message: [positions, layers, experts of a token]. None: not
    asked for."""


@dataclass(frozen=True, slots=True)
class StoredWeights:
    """A version's tensors in a local file: raw bytes, one after another in the manifest's order."""

    manifest: Manifest
    path: Path


class EngineFailed(Exception):
    """A running engine failed a request, or refused a step that its worker needs (required.py)."""


class WrongWeights(EngineFailed):
    """After an update, the engine computes with other weights than the version's. The text names them."""


class EngineDead(Exception):
    """The engine is gone, with all its requests. The text says what it died of and what to try."""


class Engine(Protocol):
    """Samples tokens with one version at a time; versions can change while requests are in flight.

    Every method but `close` raises EngineDead if the engine is gone.
    """

    def status(self) -> dict[str, str]:
        """Return fields for /v1/status, also before the start: `kind`, and settings chosen for this machine."""

    async def start(self) -> None:
        """Load the model; takes minutes for a large one. Raises UserError if it cannot be served, EngineFailed."""

    async def watch(self) -> NoReturn:
        """Wait until the engine is gone, also while it has no requests, and raise EngineDead."""

    async def generate(
        self, prompt: Sequence[int], *, request: str, temperature: float, max_tokens: int, stop: Sequence[int]
    ) -> SampledTokens:
        """Continue the prompt until a stop token or max_tokens. Requests in flight survive updates.

        Raises EngineFailed. Cancelling aborts the request.
        """

    async def pause(self) -> None:
        """Stop sampling; requests in flight wait. On return no token is being sampled. Idempotent."""

    async def partial(self, request: str) -> SampledTokens | None:
        """Return the tokens sampled so far for a request that `generate` has not returned yet. Only while paused.

        `generate` returns these tokens again, as a prefix. None: no token was sampled, or no such request is in flight.
        """

    async def sleep(self) -> None:
        """Free the memory of the weights and of all cached keys and values. Only while paused. Idempotent.

        `load` takes back the memory of the weights, `resume` the rest. `resume` without `load` brings back the weights
        that were loaded. Requests in flight recompute their prefix. Raises EngineFailed.
        """

    async def load(self, weights: StoredWeights) -> None:
        """Load these weights and drop all cached keys and values. Only while paused.

        Raises WrongWeights if the engine reads its weights back and they differ, EngineFailed.
        """

    async def resume(self) -> None:
        """Resume sampling; requests in flight recompute their prefix with the loaded weights."""

    async def score(self, tokens: Sequence[int]) -> list[float]:
        """Return log mu(tokens[i + 1] | tokens[: i + 1]) at temperature 1 (len(tokens) - 1). Raises EngineFailed."""

    async def close(self) -> None:
        """Release all resources."""
