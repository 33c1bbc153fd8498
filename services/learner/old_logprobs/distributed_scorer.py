"""Scoring by all ranks: rank 0 broadcasts micro-batches, and each rank scores its share with the weights that it holds.

One rank scores all rows of a micro-batch. Its layout is the same as on a single rank, and so is every bit of the
values.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from palimpsest.common.arrays import Float32Array
from palimpsest.services.learner.batch.batching import PaddedBatch, empty_batch
from palimpsest.services.learner.distributed import NOTHING, ProcessGroup
from palimpsest.services.learner.gpu_cache import CacheReturn, return_cache
from palimpsest.services.learner.model.failing_rows import may_be_of_row, tolerant
from palimpsest.services.learner.model.policy import score_batch
from palimpsest.services.learner.sharding.shared_work import Shards, SharedWork
from palimpsest.services.learner.sharding.turns import Turns

Pass = Callable[[PaddedBatch], Float32Array]
"""Log-prob of every token under the resident weights, [rows, tokens] float32, nats."""


@dataclass(frozen=True, slots=True, eq=False)
class Scoring:
    """Micro-batches that rank 0 broadcasts. Rank r of n scores every n-th micro-batch, starting with number r.

    Ranks that share rows count as one."""

    batches: tuple[PaddedBatch, ...]


class DistributedScorer:
    """Rank 0's side. All ranks must hold the same weights, and the other ranks must be in `serve_scoring`."""

    def __init__(self, ranks: ProcessGroup, forward: Pass) -> None:
        self._ranks, self._forward = ranks, forward

    @property
    def width(self) -> int:
        """Number of micro-batches that the ranks score at the same time."""
        return self._ranks.shares

    def __call__(self, batches: Sequence[PaddedBatch]) -> list[Float32Array]:
        """Return the log-probs of each micro-batch, [rows, tokens] float32, nats."""
        if self._ranks.size > 1:
            self._ranks.broadcast_object((Scoring(tuple(batches)),))
        shares = _share(self._ranks, batches, self._forward)
        return [shares[index % len(shares)][index // len(shares)] for index in range(len(batches))]


def serve_scoring(ranks: ProcessGroup, forward: Pass, shards: Shards | None = None) -> object:
    """Ranks other than 0: score the micro-batches of each `Scoring` that rank 0 broadcasts, do each `SharedWork`, and
    return the cache of torch at each `CacheReturn`.

    shards: of a sharded policy. Return the first other object that rank 0 broadcasts; None if that is NOTHING.
    """
    while isinstance(order := ranks.broadcast_object(NOTHING)[0], Scoring | SharedWork | CacheReturn):
        if isinstance(order, Scoring):
            _share(ranks, order.batches, forward)
        elif isinstance(order, CacheReturn):
            return_cache(ranks)
        else:
            assert shards is not None
            order.work(shards)
    return order


def model_scorer(model: torch.nn.Module, device: torch.device) -> Pass:
    """Return a function that scores a micro-batch with the model's weights at the time of the call."""

    @torch.no_grad()
    def score(batch: PaddedBatch) -> Float32Array:
        values = score_batch(model, batch, device)
        scored: Float32Array = values.cpu().numpy()
        return scored

    return score


def _share(ranks: ProcessGroup, batches: Sequence[PaddedBatch], forward: Pass) -> list[list[Float32Array]]:
    """Every rank's share of the values, in rank order."""
    own = batches[ranks.share :: ranks.shares]
    if not ranks.equal_passes:
        score = tolerant(forward)  # a row that fails leaves this rank in step with the others
        return ranks.gather_shares([score(batch) for batch in own])
    values: dict[int, Float32Array] = {}
    for i, batch in enumerate(own):
        try:
            values[i] = forward(batch)
        except Exception as error:
            if not may_be_of_row(error):
                raise
    if len(own) < -(-len(batches) // ranks.shares):
        forward(empty_batch())
    failed = [i for i in range(len(own)) if i not in values]
    if any(ranks.all_gather_object(bool(failed))):
        turns = Turns(ranks, idle=lambda: forward(empty_batch()))

        def in_turn(batch: PaddedBatch) -> Float32Array:
            with turns.trial():
                return forward(batch)

        values |= turns.search(lambda: {i: tolerant(in_turn)(own[i]) for i in failed})
    return ranks.gather_shares([values[i] for i in range(len(own))])
