"""The published weights of a sharded policy, and their canaries: all ranks compute, rank 0 keeps the result."""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial

import torch

from palimpsest.common.snapshots.frames import RawTensor
from palimpsest.services.learner.batch.batching import PaddedBatch, Row, empty_batch
from palimpsest.services.learner.model.checkpoint_names import part_views
from palimpsest.services.learner.model.float32 import float32_forward
from palimpsest.services.learner.model.weights import raw_tensors
from palimpsest.services.learner.publishing.canaries import Canaries, canary_logprobs, sample
from palimpsest.services.learner.sharding.load import COMPUTES
from palimpsest.services.learner.sharding.sharded_model import whole
from palimpsest.services.learner.sharding.shared_work import OnAllRanks, Shards


@torch.no_grad()
def gather_weights(shards: Shards) -> list[RawTensor]:
    """Return the published weights in host memory on rank 0, [] on other ranks.

    One weight after another is cast to bf16 on each rank and gathered, so a rank holds one whole weight at a time.
    """
    tensors: list[RawTensor] = []
    for own, parameter in shards.policy.model.shards():
        gathered = whole(parameter, dtype=COMPUTES)
        if shards.ranks.is_rank0:
            parts = {name: part.cpu() for name, part in part_views(shards.files.names[own], gathered)}
            tensors += raw_tensors(parts)
    return tensors


def score_canaries(shards: Shards, batches: Sequence[PaddedBatch], *, float32: bool) -> list[list[list[float]]]:
    """Return the log-probs of each batch, [rows][tokens], on every rank. Each rank computes its share."""
    ranks, model = shards.ranks, shards.policy.model
    own = list(batches[ranks.share :: ranks.shares])
    passes = -(-len(batches) // ranks.shares)
    own += [empty_batch() for _ in range(passes - len(own))]
    with float32_forward(model) if float32 else nullcontext():
        values = [canary_logprobs(model, batch, ranks.device) for batch in own]
    parts = ranks.gather_shares(values)
    return [parts[index % ranks.shares][index // ranks.shares] for index in range(len(batches))]


def sample_canaries(shards: Shards) -> list[Row]:
    """Return sequences that the model samples, the same on every rank."""
    rows: list[Row] = shards.policy.model(partial(sample, device=shards.ranks.device))
    return rows


class ShardedCanaries(Canaries):
    """See Canaries."""

    def __init__(self, on_all_ranks: OnAllRanks, *, trajectories: int, micro_batch_tokens: int) -> None:
        self._on_all_ranks = on_all_ranks
        self._limit(trajectories, micro_batch_tokens)

    def _values(self, batches: Sequence[PaddedBatch], *, float32: bool) -> list[list[list[float]]]:
        return self._on_all_ranks(partial(score_canaries, batches=batches, float32=float32))

    def _samples(self) -> list[Row]:
        return self._on_all_ranks(sample_canaries)
