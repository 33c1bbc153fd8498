"""Canaries: the sequences of a version by which a worker checks that its engine computes that version.

Trajectories of the newest batch serve as canaries: the model finds them likely, so rounding is small there, and the
last step changed their log-probs most. Before any batch, the model's own samples take their place. Each canary carries
its log-probs in the learner's precision, and in float32 under the weights before and after the step. The difference
between the two precisions is the noise by which the worker judges its engine; the float32 values have none of their
own, so the change between the two versions is known without it (docs/paper.md, "canary").
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from palimpsest.common.snapshots.manifest import Canary
from palimpsest.common.versions import UNTRAINABLE
from palimpsest.services.learner.batch.batching import PaddedBatch, Row, micro_batches, pad
from palimpsest.services.learner.model.float32 import float32_forward
from palimpsest.services.learner.model.output_head import find_head
from palimpsest.services.learner.model.policy import score_batch

MOST_TOKENS = 1024
"""Limit of all canaries together, prompts included: each version scores them three times."""
WINDOW = 256
"""Limit of one canary, in tokens. Of a longer row the window with its last trainable token is taken."""
SAMPLES, SAMPLE_LENGTH, SAMPLE_SEED = 16, 12, 20_011
"""The model's own samples that serve before the first batch."""


class Canaries:
    """Prepares the canaries of the next version.

    micro_batch_tokens: limit of one forward pass, padding included.
    """

    def __init__(
        self, model: torch.nn.Module, device: torch.device, *, trajectories: int, micro_batch_tokens: int
    ) -> None:
        self._model, self._device = model, device
        find_head(model)  # recognized in the model's own precision, before the first float32 pass
        self._limit(trajectories, micro_batch_tokens)

    def _limit(self, trajectories: int, micro_batch_tokens: int) -> None:
        self._trajectories, self._micro_batch_tokens = trajectories, micro_batch_tokens
        self._rows: list[Row] = []
        self._before: list[tuple[float, ...]] = []

    def use(self, trajectories: int) -> None:
        """Use this number of trajectories from the next version on."""
        self._trajectories = trajectories

    def choose(self, rows: Sequence[Row]) -> None:
        """Choose rows of the batch, and score them under the weights before the step."""
        self._rows = []
        left = MOST_TOKENS
        candidates = sorted((row for row in rows if row.trainable), key=lambda row: row.trajectory)
        for row in candidates[:: max(1, len(candidates) // self._trajectories)][: self._trajectories]:
            part = window(row, WINDOW)
            if part is not None and len(part.tokens) <= left:
                self._rows.append(part)
                left -= len(part.tokens)
        self._before = self._score(self._rows, float32=True)

    def made(self) -> tuple[Canary, ...]:
        """Return the canaries under the model's present weights."""
        rows = self._rows or self._samples()
        before: Sequence[tuple[float, ...]] = self._before if self._rows else [()] * len(rows)
        low, high = self._score(rows, float32=False), self._score(rows, float32=True)
        return tuple(
            Canary(tuple(row.tokens.tolist()), _positions(row), after, previous, exact)
            for row, after, previous, exact in zip(rows, low, before, high, strict=True)
        )

    def _score(self, rows: Sequence[Row], *, float32: bool) -> list[tuple[float, ...]]:
        """Log-probs of each row's compared tokens, in the order of the rows."""
        scored: dict[str, tuple[float, ...]] = {}
        parts = micro_batches(rows, max_tokens=self._micro_batch_tokens)
        for part, values in zip(parts, self._values([pad(part) for part in parts], float32=float32), strict=True):
            for row, own in zip(part, values, strict=True):
                scored[row.trajectory] = tuple(own[p] for p in _positions(row))
        return [scored[row.trajectory] for row in rows]

    def _values(self, batches: Sequence[PaddedBatch], *, float32: bool) -> list[list[list[float]]]:
        """Log-probs of each batch, [rows][tokens]."""
        with float32_forward(self._model) if float32 else nullcontext():
            return [canary_logprobs(self._model, batch, self._device) for batch in batches]

    def _samples(self) -> list[Row]:
        return sample(self._model, device=self._device)


@torch.no_grad()
def canary_logprobs(model: torch.nn.Module, batch: PaddedBatch, device: torch.device) -> list[list[float]]:
    """Return the log-probs of a batch at temperature 1, [rows][tokens]."""
    values: list[list[float]] = score_batch(model, batch, device, temperature=1.0).tolist()
    return values


@torch.no_grad()
def sample(model: torch.nn.Module, *, device: torch.device) -> list[Row]:
    """Return sequences that the model samples itself at temperature 1, the same at each call under the same weights."""
    generator = torch.Generator().manual_seed(SAMPLE_SEED)
    tokens = torch.full((SAMPLES, 1), _first_token(model), dtype=torch.int64)
    for _ in range(SAMPLE_LENGTH):
        logits = model(input_ids=tokens.to(device), use_cache=False).logits[:, -1].float().cpu()
        drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        tokens = torch.cat([tokens, drawn], dim=1)
    versions = np.zeros(SAMPLE_LENGTH + 1, dtype=np.int32)
    versions[0] = UNTRAINABLE
    behavior = np.zeros(SAMPLE_LENGTH + 1, dtype=np.float32)
    return [
        Row(str(i), own.astype(np.int32), versions, behavior, 1.0, 0.0, 0.0, success=False)
        for i, own in enumerate(tokens.numpy())
    ]


def window(row: Row, length: int) -> Row | None:
    """At most `length` tokens of a row, up to its last trainable token. None if no compared token is among them.

    The first token of a window is never compared, since nothing in the window predicts it.
    """
    stop = int(np.flatnonzero(row.versions != UNTRAINABLE)[-1]) + 1
    part = slice(max(0, stop - length), stop)
    versions = row.versions[part].copy()
    versions[0] = UNTRAINABLE
    if not (versions != UNTRAINABLE).any():
        return None
    return replace(row, tokens=row.tokens[part], versions=versions, behavior=row.behavior[part], old=None, routes=None)


def _positions(row: Row) -> tuple[int, ...]:
    return tuple(int(p) for p in np.flatnonzero(row.versions != UNTRAINABLE))


def _first_token(model: torch.nn.Module) -> int:
    """The id that begins a text for this model: its bos token, else an eos token, else id 0."""
    config: Any = getattr(model, "config", None)
    if config is None:
        return 0
    text = config.get_text_config()
    for value in (text.bos_token_id, text.eos_token_id):
        first = value[0] if isinstance(value, list) and value else value
        if isinstance(first, int):
            return first
    return 0
