"""Versions and checkpoints of a sharded policy, made and read by the ranks of shard_on_ranks.py."""

import io
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from msgspec.structs import replace

from palimpsest.common.config.learner import OptimizerConfig
from palimpsest.common.snapshots import shared_objects
from palimpsest.common.snapshots.adapter import Adapter
from palimpsest.common.snapshots.client import VersionMissing
from palimpsest.common.snapshots.encoding import encode_version
from palimpsest.common.snapshots.frames import Hashed, RawTensor
from palimpsest.common.snapshots.manifest import SCHEMA, Manifest, Parent, seal, unseal, version_digest
from palimpsest.common.snapshots.shared_objects import SharedObjects
from palimpsest.common.user_error import UserError
from palimpsest.common.versions import Version
from palimpsest.services.learner.batch.batching import Row, pad
from palimpsest.services.learner.distributed import ProcessGroup
from palimpsest.services.learner.old_logprobs.distributed_scorer import serve_scoring
from palimpsest.services.learner.publishing.canaries import Canaries, sample
from palimpsest.services.learner.sharding.build import build_part
from palimpsest.services.learner.sharding.load import COMPUTES, ModelFiles
from palimpsest.services.learner.sharding.published_weights import (
    CollectiveOrders,
    ShardedWeights,
    copy_part,
    sample_canaries,
    score_canaries,
)
from palimpsest.services.learner.sharding.shard_files import write_shards
from palimpsest.services.learner.sharding.sharded_model import whole
from palimpsest.services.learner.sharding.sharded_policy import ShardedPolicy
from palimpsest.services.learner.sharding.shared_work import OnAllRanks, Shards
from palimpsest.services.learner.sharding.versioned_shards import VersionedShards
from tests.learner_parts.models import CPU
from tests.processes.waiting import LIMIT_S
from tests.servers.stored_weights import flip

DAMAGED, LOST = Version(3), Version(4)


class Versions:
    """A store in memory: version 0 in full, the others as deltas to the version before."""

    def __init__(self, adapter: Adapter | None = None) -> None:
        """adapter: what the versions are; None: whole weights."""
        self._adapter = adapter
        self.manifests: dict[Version, Manifest] = {}
        self.objects: dict[str, bytes] = {}
        self.weights: dict[Version, list[RawTensor]] = {}
        self.compression = 1
        self.served = Counter[Version]()
        """Versions whose object this rank has downloaded -> times."""

    def send_object(self, digest: str, size: int, file: IO[bytes]) -> None:
        """See SnapshotClient."""
        file.seek(0)
        self.objects[digest] = file.read()
        assert len(self.objects[digest]) == size

    def put_manifest(self, manifest: Manifest) -> None:
        """See SnapshotClient."""
        self.manifests[manifest.version] = unseal(seal(manifest))

    def exchange(self, ranks: ProcessGroup) -> None:
        """Let every rank have what any of them stored."""
        for each in ranks.all_gather_object(self.objects):
            self.objects |= each
        self.manifests = ranks.broadcast_object(self.manifests)

    def add(self, version: Version, weights: list[RawTensor]) -> None:
        file, before = io.BytesIO(), Version(version - 1)
        old = {tensor.name: tensor.raw for tensor in self.weights[before]} if version else None
        encoded = encode_version(weights, old, file, level=1, threads=1)
        manifest = Manifest(
            schema=SCHEMA, run="t", writer=1, version=version, digest=version_digest(encoded.entries),
            encoding="delta" if version else "slices", object=encoded.digest, object_size=encoded.size,
            tensors=tuple(encoded.entries), canaries=(), adapter=self._adapter,
            parent=Parent(before, self.manifests[before].digest) if version else None,
        )  # fmt: skip
        self.manifests[version], self.objects[encoded.digest] = manifest, file.getvalue()
        self.weights[version] = weights

    def damage(self, version: Version) -> None:
        """Let the last tensor of a version have another digest."""
        manifest = self.manifests[version]
        last = replace(manifest.tensors[-1], digest=manifest.tensors[0].digest)
        self.manifests[version] = replace(manifest, tensors=(*manifest.tensors[:-1], last))

    def manifest(self, version: Version) -> Manifest:
        if version not in self.manifests:
            raise VersionMissing(f"version {version} is not there")
        return self.manifests[version]

    @contextmanager
    def object(self, manifest: Manifest) -> Iterator[Iterator[bytes]]:
        bodies = [self.objects[each.digest] for each in manifest.objects]
        Hashed(iter(bodies), manifest).verify()
        self.served[manifest.version] += 1
        yield iter(bodies)


def walked(files: ModelFiles, ranks: ProcessGroup, folder: Path) -> dict[str, Any]:
    """Move a sharded shadow over versions. Return what it held, what it had to hold, the errors, and the downloads.

    folder: of the files that the ranks share. Before the last move one of them is damaged.
    """
    shared_objects.PATIENCE_S = LIMIT_S
    policy = ShardedPolicy(files.build(holds=torch.float32, trains=True), OptimizerConfig(), ranks)
    store, held_bytes = Versions(), []
    shards = a_rank(policy, files, ranks, store)
    orders = OnAllRanks(shards)
    publisher = ShardedWeights(orders, CollectiveOrders(orders), store, run="t")  # type: ignore[arg-type]
    for number in range(4):
        store.weights[Version(number)] = whole_version(shards)
        shared = {tensor.raw.base.untyped_storage().nbytes() for tensor in shards.part.copied}  # type: ignore[union-attr]
        if ranks.is_rank0:
            publisher.copy()
            publisher.store(Version(number), (), writer=1)
            ranks.broadcast_object(("enough",))
        else:
            assert serve_scoring(ranks, unused, shards) == "enough"
        held_bytes.append(shards.part.held_bytes)
        store.exchange(ranks)
        for master in policy.masters:
            master.add_(1e-4 * torch.randn(master.shape, generator=torch.Generator().manual_seed(number)))
    store.damage(DAMAGED)
    if not ranks.is_rank0:
        store.manifests[LOST] = store.manifests[Version(0)]
    source = SharedObjects(store, folder)
    shadow: Any = VersionedShards(files.build(holds=COMPUTES, trains=False), files, source, ranks)
    held, errors, served = {}, [], []
    for version in map(Version, (1, 0, 2, LOST, DAMAGED, 1, 2)):
        if version == 2 and version in held:
            served.append(dict(store.served))
            if ranks.is_rank0:
                flip(folder / store.manifests[version].object, store.manifests[version].object_size // 2)
            ranks.broadcast_object("damaged")
        try:
            assert shadow.load_version(version)
        except (UserError, VersionMissing) as error:
            errors.append(str(error))
            continue
        held[version] = {name: whole(parameter) for name, parameter in shadow.model.shards()}
    expected = {
        version: {each.name: torch.from_numpy(each.raw.copy()).view(COMPUTES).reshape(each.shape) for each in weights}
        for version, weights in store.weights.items()
    }
    return {
        "held": held,
        "expected": expected,
        "errors": errors,
        "served": [*served, dict(store.served)],
        "held_bytes": held_bytes,
        "storages": shared,
        "sizes": {tensor.name: len(tensor.raw) for tensor in store.weights[Version(0)]},
        "own": sorted(shards.part.tensors),
        "manifests": store.manifests,
        "alone": {version: digest_alone(weights) for version, weights in store.weights.items()},
    }


def digest_alone(weights: list[RawTensor]) -> str:
    """The digest of a version that one process stores."""
    return version_digest(encode_version(weights, None, io.BytesIO(), level=1, threads=1).entries)


def unused(_batch: Any) -> Any:
    """Score nothing: no rank orders it."""
    raise NotImplementedError


def a_rank(policy: ShardedPolicy, files: ModelFiles, ranks: ProcessGroup, store: Any = None) -> Shards:
    """A rank's shards of a policy. store: gets the versions."""
    return Shards(policy, files, ranks, build_part(policy.model, files, ranks, store))


def whole_version(shards: Shards) -> list[RawTensor]:
    """All tensors of the version that the ranks would store now."""
    copy_part(shards)
    return [tensor for own in shards.ranks.all_gather_object(shards.part.copied) for tensor in own]


def continued(files: ModelFiles, ranks: ProcessGroup, folder: Path) -> dict[str, Any]:
    """Write a checkpoint of a trained policy and read it into another one. Return the state of both."""

    def state(policy: ShardedPolicy) -> dict[str, torch.Tensor]:
        return {name: whole(tensor) for name, tensor in policy.shards().items()}  # type: ignore[arg-type]

    before, after = (
        ShardedPolicy(files.build(holds=torch.float32, trains=True), OptimizerConfig(lr=1e-3), ranks) for _ in range(2)
    )
    for gradient in before.gradients():
        gradient.fill_(1e-3)
    before.step()
    written = write_shards(a_rank(before, files, ranks), folder)
    if ranks.is_rank0:
        after.source = folder
        after.restore({}, before.steps)
    after.share(ranks)
    return {"files": written, "before": state(before), "after": state(after), "steps": after.steps}


def canaries(files: ModelFiles, ranks: ProcessGroup, model: torch.nn.Module, rows: list[Row]) -> dict[str, Any]:
    """Log-probs of canaries and the model's samples, by all ranks and by `model`, which has the same weights."""
    policy = ShardedPolicy(files.build(holds=torch.float32, trains=True), OptimizerConfig(), ranks)
    shards = a_rank(policy, files, ranks)
    alone = Canaries(model, ranks.device, trajectories=1, micro_batch_tokens=4096)
    batches = [pad([row]) for row in rows[:3]]
    return {
        "sharded": [score_canaries(shards, batches, float32=float32) for float32 in (False, True)],
        "alone": [alone._values(batches, float32=float32) for float32 in (False, True)],
        "sampled": [[row.tokens for row in rows] for rows in (sample_canaries(shards), sample(model, device=CPU))],
    }
