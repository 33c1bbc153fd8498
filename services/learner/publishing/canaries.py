"""Canaries: token sequences with their log-probs under a version (docs/paper.md, "canary").

A worker scores the canaries with its engine to check that the engine computes the version. Trajectories of the newest
batch are the best canaries: the engine's rounding is smallest on them, and the last training step changes them most.
Each is scored with the weights before and after the step. So a worker detects an engine that kept some old weights even
if the step changes the log-probs by less than rounding: the engine's values are closer to the ones before the step.
"""

from collections.abc import Sequence

import torch

from palimpsest.common.snapshots.manifest import Canary
from palimpsest.common.versions import UNTRAINABLE
from palimpsest.services.learner.batch.batching import Row, pad
from palimpsest.services.learner.model.policy import score_batch, token_logprobs, vocabulary_size

MOST_TOKENS = 8192
"""Maximum tokens of all canaries together, prompts included. It keeps the cost of scoring them small."""
FIRST_LENGTH, FIRST_SEED = 64, 20_011


class Canaries:
    """Chooses and scores the canaries of the next version. trajectories: maximum number of canaries."""

    def __init__(self, model: torch.nn.Module, device: torch.device, *, trajectories: int) -> None:
        self._model, self._device, self._trajectories = model, device, trajectories
        self._rows: list[Row] = []
        self._before: list[list[float]] = []

    def choose(self, rows: Sequence[Row]) -> None:
        """Choose rows of the batch to be trained on, and score them with the weights before the step."""
        self._rows, tokens = [], 0
        step = max(1, len(rows) // self._trajectories)
        for row in sorted(rows, key=lambda row: row.trajectory)[::step]:
            tokens += len(row.tokens)
            if row.trainable and tokens <= MOST_TOKENS and len(self._rows) < self._trajectories:
                self._rows.append(row)
        self._before = self._score()

    def made(self) -> tuple[Canary, ...]:
        """Return the canaries, scored with the model's current weights."""
        if not self._rows:
            return (self._first(),)
        return tuple(
            Canary(tuple(row.tokens.tolist()), _positions(row), tuple(after), tuple(before))
            for row, before, after in zip(self._rows, self._before, self._score(), strict=True)
        )

    @torch.no_grad()
    def _score(self) -> list[list[float]]:
        if not self._rows:
            return []
        scored = score_batch(self._model, pad(self._rows), self._device, temperature=1.0)
        return [[float(scored[i, p]) for p in _positions(row)] for i, row in enumerate(self._rows)]

    @torch.no_grad()
    def _first(self) -> Canary:
        """The canary of the first version, before any batch: a fixed random sequence."""
        generator = torch.Generator().manual_seed(FIRST_SEED)
        tokens = torch.randint(vocabulary_size(self._model), (1, FIRST_LENGTH), generator=generator)
        scored = token_logprobs(self._model, tokens.to(self._device), torch.ones(1, 1, device=self._device))
        return Canary(
            tuple(tokens[0].tolist()), tuple(range(1, FIRST_LENGTH)), tuple(scored[0, 1:].tolist()), previous=()
        )


def _positions(row: Row) -> tuple[int, ...]:
    return tuple(int(p) for p in (row.versions != UNTRAINABLE).nonzero()[0])
