"""Counts the forward passes that sources of the proximal make."""

import copy
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from palimpsest.services.learner.batch.batching import PaddedBatch
from palimpsest.services.learner.model.policy import score_batch
from palimpsest.services.learner.old_logprobs import passes
from palimpsest.services.learner.proximal.surrogates import forward_pass


@dataclass
class Passes:
    """The passes so far."""

    batches: list[PaddedBatch] = field(default_factory=list)
    weights: list[torch.nn.Module] = field(default_factory=list)
    """A copy of the model at each pass."""

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """[rows, length] of each pass."""
        return [batch.tokens.shape for batch in self.batches]

    @property
    def rows(self) -> int:
        """Number of rows over all passes."""
        return sum(rows for rows, _ in self.shapes)

    @property
    def tokens(self) -> int:
        """Number of tokens over all passes, padding included."""
        return sum(batch.tokens.size for batch in self.batches)


def count_passes(monkeypatch: pytest.MonkeyPatch) -> Passes:
    """Count the passes from now on; they compute as before."""
    seen = Passes()

    def score(model: torch.nn.Module, batch: PaddedBatch, *rest: Any, **named: Any) -> torch.Tensor:
        seen.batches.append(batch)
        seen.weights.append(copy.deepcopy(model))
        return score_batch(model, batch, *rest, **named)

    for module in (passes, forward_pass):
        monkeypatch.setattr(module, "score_batch", score)
    return seen
