"""The published weights of a sharded policy, and their canaries.

Each rank copies, encodes and uploads the tensors that it stores (tensor_owners.py). Rank 0 writes the manifest when all
parts are stored. Until then the version does not exist: if a rank dies, the store removes the parts as it removes every
object without a manifest.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch

from palimpsest.common.logs import logger
from palimpsest.common.snapshots.chain import ChainCost
from palimpsest.common.snapshots.client import ObjectMissing, ParentMissing, SnapshotClient
from palimpsest.common.snapshots.encoding import EncodedVersion, join
from palimpsest.common.snapshots.frames import RawTensor
from palimpsest.common.snapshots.manifest import Canary, Manifest, Parent
from palimpsest.common.versions import Version
from palimpsest.services.learner.batch.batching import PaddedBatch, Row, empty_batch
from palimpsest.services.learner.model.checkpoint_names import part_views
from palimpsest.services.learner.model.float32 import float32_forward
from palimpsest.services.learner.model.weights import raw_tensors
from palimpsest.services.learner.publishing.canaries import Canaries, canary_logprobs, sample
from palimpsest.services.learner.sharding.load import COMPUTES
from palimpsest.services.learner.sharding.sharded_model import whole
from palimpsest.services.learner.sharding.shared_work import OnAllRanks, Shards


@torch.no_grad()
def copy_part(shards: Shards) -> None:
    """Copy the tensors that this rank stores to host memory.

    One weight after another is cast to bf16 on each rank and gathered, so a rank holds one whole weight at a time.
    """
    if shards.server is not None:
        shards.server.finish()
    tensors: list[RawTensor] = []
    for own, parameter in shards.policy.model.shards():
        gathered = whole(parameter, dtype=COMPUTES)
        for name, part in part_views(shards.files.names[own], gathered):
            if name in shards.part.tensors:  # a copy, so that the rest of a weight does not stay in memory
                tensors += raw_tensors({name: part.to("cpu", copy=True)})
    shards.part.take(tensors)
    if shards.server is not None:
        shards.server.begin()


def encode_part(shards: Shards, *, delta: bool) -> list[EncodedVersion]:
    """Encode this rank's part; see VersionPart. Return what every rank encoded, in rank order."""
    return shards.ranks.all_gather_object(shards.part.encode(delta=delta))


def send_part(shards: Shards, *, again: bool) -> int:
    """Upload this rank's part; see VersionPart. Return the bytes of all ranks for which the store has no room."""
    return sum(shards.ranks.all_gather_object(shards.part.send(again=again)))


def keep_part(shards: Shards) -> None:
    """Let this rank's part be the one from which the next delta leads."""
    shards.part.keep()


class PartOrders(Protocol):
    """Orders of rank 0 to all ranks about their parts of a version."""

    def encode(self, *, delta: bool) -> list[EncodedVersion]:
        """Encode; see VersionPart. Return what every rank encoded, in rank order."""

    def send(self, *, again: bool = False) -> int:
        """Upload; see VersionPart. Return the bytes of all ranks for which the store has no room."""

    def keep(self) -> None:
        """The version is stored. There are no more orders for it."""


class CollectiveOrders:
    """See PartOrders. By orders of the loop's thread: the other ranks must wait for them."""

    def __init__(self, on_all_ranks: OnAllRanks) -> None:
        self._on_all_ranks = on_all_ranks

    def encode(self, *, delta: bool) -> list[EncodedVersion]:
        """See PartOrders."""
        return self._on_all_ranks(partial(encode_part, delta=delta))

    def send(self, *, again: bool = False) -> int:
        """See PartOrders."""
        return self._on_all_ranks(partial(send_part, again=again))

    def keep(self) -> None:
        """See PartOrders."""
        self._on_all_ranks(keep_part)


@dataclass(frozen=True, slots=True)
class StoredParent:
    """The version stored last, of which each rank has its part."""

    parent: Parent
    cost: ChainCost
    """Of the chain that ends with it."""


class ShardedWeights:
    """See VersionWeights. Rank 0's side; the other ranks must wait for orders."""

    def __init__(self, on_all_ranks: OnAllRanks, parts: PartOrders, store: SnapshotClient, *, run: str) -> None:
        self._on_all_ranks, self._parts, self._store, self._run = on_all_ranks, parts, store, run
        self._parent: StoredParent | None = None

    def copy(self) -> None:
        """See VersionWeights."""
        self._on_all_ranks(copy_part)

    def store(self, version: Version, canaries: Sequence[Canary], *, writer: int) -> Manifest:
        """See VersionWeights."""
        before = self._parent
        try:
            manifest = self._put(version, canaries, writer, before)
        except ParentMissing as error:
            logger().warning("stored in full", version=version, reason=str(error))
            manifest = self._put(version, canaries, writer, None)
        self._parts.keep()
        cost = before.cost if before is not None else ChainCost(manifest.object_size)
        self._parent = StoredParent(Parent(version, manifest.digest), cost.after(manifest))
        return manifest

    def _put(self, version: Version, canaries: Sequence[Canary], writer: int, before: StoredParent | None) -> Manifest:
        encoded, parent = self._encoded(before)
        manifest = encoded.manifest(self._run, version, canaries, writer=writer, parent=parent, adapter=None)
        self._send()
        try:
            self._store.put_manifest(manifest)
        except ObjectMissing:
            # the store restarted after it had received a part, or removed it because the manifest came an hour later
            self._send(again=True)
            self._store.put_manifest(manifest)
        return manifest

    def _encoded(self, before: StoredParent | None) -> tuple[EncodedVersion, Parent | None]:
        """Let every rank encode its part: as a delta if all together cost less than a base. Return its parent, too."""
        if before is not None:
            delta = join(self._parts.encode(delta=True))
            if before.cost.admits(delta.size):
                return delta, before.parent
        return join(self._parts.encode(delta=False)), None

    def _send(self, *, again: bool = False) -> None:
        """Let every rank upload its part. Rank 0 waits for the room, because a stop reaches it."""
        refused = self._parts.send(again=again)
        while refused:
            self._store.wait_for_room(refused)
            refused = self._parts.send()


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
