"""Ranks as threads of this process, each with its part of a version."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from palimpsest.common.snapshots.client import SnapshotClient
from palimpsest.common.snapshots.encoding import EncodedVersion
from palimpsest.common.snapshots.frames import RawTensor
from palimpsest.common.snapshots.manifest import Canary, Manifest
from palimpsest.common.versions import Version
from palimpsest.services.learner.sharding.published_weights import ShardedWeights
from palimpsest.services.learner.sharding.tensor_owners import tensor_owners
from palimpsest.services.learner.sharding.version_part import VersionPart

T = TypeVar("T")


class RankThreads:
    """See PartOrders: every rank is a thread."""

    def __init__(self, store: SnapshotClient, tensors: Sequence[RawTensor], ranks: int) -> None:
        owners = tensor_owners({tensor.name: len(tensor.raw) for tensor in tensors}, ranks)
        own = [[name for name, owner in owners.items() if owner == rank] for rank in range(ranks)]
        self.parts = [VersionPart(store, names, threads=1) for names in own]
        self.calls: list[str] = []
        """Names of the orders."""

    def encode(self, *, delta: bool) -> list[EncodedVersion]:
        """See PartOrders."""
        return self._on_all("encode", lambda part: part.encode(delta=delta))

    def send(self, *, again: bool = False) -> int:
        """See PartOrders."""
        return sum(self._on_all("send", lambda part: part.send(again=again)))

    def keep(self) -> None:
        """See PartOrders."""
        self._on_all("keep", lambda part: part.keep())

    def _on_all(self, name: str, work: Callable[[VersionPart], T]) -> list[T]:
        self.calls.append(name)
        with ThreadPoolExecutor(len(self.parts)) as pool:
            return list(pool.map(work, self.parts))


class ShardedStore:
    """Stores versions as ranks do."""

    def __init__(self, client: SnapshotClient, tensors: Sequence[RawTensor], *, run: str = "t", ranks: int = 2) -> None:
        """tensors: their names and sizes are those of all versions."""
        self.ranks = RankThreads(client, tensors, ranks)
        unused: Any = None
        self.weights = ShardedWeights(unused, self.ranks, client, run=run)

    def put(
        self, version: int, tensors: Sequence[RawTensor], canaries: Sequence[Canary] = (), *, writer: int = 1
    ) -> Manifest:
        """Store a version."""
        for part in self.ranks.parts:
            part.take([tensor for tensor in tensors if tensor.name in part.tensors])
        return self.weights.store(Version(version), canaries, writer=writer)
