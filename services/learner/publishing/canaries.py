"""What goes with a version so that a worker can tell whether its engine computes it (docs/paper.md, "canary").

Trajectories of the newest batch are the best canaries: there the engine's rounding is smallest, and what training has
just changed shows most. Each is scored under the weights before the step and after it, so that an engine that kept old
weights somewhere betrays itself by leaning towards them, even when a step changes less than rounding does.
"""

from collections.abc import Sequence

import torch

from palimpsest.common.snapshots.manifest import Canary
from palimpsest.common.versions import UNTRAINABLE
from palimpsest.services.learner.batch.batching import Row, pad
from palimpsest.services.learner.model.policy import score_batch, token_logprobs, vocabulary_size

MOST_TOKENS = 8192
"""Over all canaries, prompts included: scoring them must stay a trifle."""
FIRST_LENGTH, FIRST_SEED = 64, 20_011


class Canaries:
    """Keeps the canaries of the next version."""

    def __init__(self, model: torch.nn.Module, device: torch.device, *, trajectories: int) -> None:
        self._model, self._device, self._trajectories = model, device, trajectories
        self._rows: list[Row] = []
        self._before: list[list[float]] = []

    def choose(self, rows: Sequence[Row]) -> None:
        """Take some rows of the batch about to be trained on, and score them while the weights are still the old."""
        self._rows, tokens = [], 0
        step = max(1, len(rows) // self._trajectories)
        for row in sorted(rows, key=lambda row: row.trajectory)[::step]:
            tokens += len(row.tokens)
            if row.trainable and tokens <= MOST_TOKENS and len(self._rows) < self._trajectories:
                self._rows.append(row)
        self._before = self._score()

    def made(self) -> tuple[Canary, ...]:
        """The canaries under the model's present weights."""
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
        scored, _ = score_batch(self._model, pad(self._rows), self._device, temperature=1.0)
        return [[float(scored[i, p]) for p in _positions(row)] for i, row in enumerate(self._rows)]

    @torch.no_grad()
    def _first(self) -> Canary:
        """Without any batch yet: a fixed random sequence."""
        generator = torch.Generator().manual_seed(FIRST_SEED)
        tokens = torch.randint(vocabulary_size(self._model), (1, FIRST_LENGTH), generator=generator)
        scored, _ = token_logprobs(self._model, tokens.to(self._device), torch.ones(1, 1, device=self._device))
        return Canary(
            tuple(tokens[0].tolist()), tuple(range(1, FIRST_LENGTH)), tuple(scored[0, 1:].tolist()), previous=()
        )


def _positions(row: Row) -> tuple[int, ...]:
    return tuple(int(p) for p in (row.versions != UNTRAINABLE).nonzero()[0])
