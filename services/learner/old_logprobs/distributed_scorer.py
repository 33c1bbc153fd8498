"""Scoring by all ranks: rank 0 hands micro-batches out, and each rank scores its share by the weights that it holds.

A micro-batch is scored whole by one rank, so its layout, and with it every bit of the values, is as on a single rank.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from palimpsest.common.arrays import Float32Array
from palimpsest.services.learner.batch.batching import PaddedBatch
from palimpsest.services.learner.distributed import NOTHING, ProcessGroup
from palimpsest.services.learner.model.policy import score_batch

Pass = Callable[[PaddedBatch], Float32Array]
"""Log-prob of every token under the resident weights, [rows, tokens] float32, nats."""


@dataclass(frozen=True, slots=True, eq=False)
class Scoring:
    """What rank 0 hands out: micro-batches, of which each rank takes every `size`-th, beginning at its own number."""

    batches: tuple[PaddedBatch, ...]


class DistributedScorer:
    """Rank 0's side. All ranks must hold the same weights, and the others be in `score_along`."""

    def __init__(self, ranks: ProcessGroup, forward: Pass) -> None:
        self._ranks, self._one = ranks, forward

    @property
    def width(self) -> int:
        """So many micro-batches take as long as one."""
        return self._ranks.size

    def __call__(self, batches: Sequence[PaddedBatch]) -> list[Float32Array]:
        """Each micro-batch's log-probs, [rows, tokens] float32, nats."""
        if self._ranks.size > 1:
            self._ranks.broadcast_object((Scoring(tuple(batches)),))
        shares = _share(self._ranks, batches, self._one)
        return [shares[place % len(shares)][place // len(shares)] for place in range(len(batches))]


def serve_scoring(ranks: ProcessGroup, one: Pass) -> object:
    """Ranks other than 0: score what rank 0 hands out until it says something else, and return that (None: nothing)."""
    while isinstance(word := ranks.broadcast_object(NOTHING)[0], Scoring):
        _share(ranks, word.batches, one)
    return word


def model_scorer(model: torch.nn.Module, device: torch.device) -> Pass:
    """Scores by this model, whatever its weights are at the time."""

    @torch.no_grad()
    def score(batch: PaddedBatch) -> Float32Array:
        values, _ = score_batch(model, batch, device)
        scored: Float32Array = values.cpu().numpy()
        return scored

    return score


def _share(ranks: ProcessGroup, batches: Sequence[PaddedBatch], one: Pass) -> list[list[Float32Array]]:
    """Every rank's share of the values, in rank order."""
    return ranks.all_gather_object([one(batch) for batch in batches[ranks.rank :: ranks.size]])
