"""A sharded model whose adapter holds one version at a time. Every rank reads the whole adapter from the store."""

from palimpsest.common.snapshots.adapter import Adapter
from palimpsest.common.snapshots.client import VersionMissing
from palimpsest.common.snapshots.walker import VersionSource
from palimpsest.common.versions import Version
from palimpsest.services.learner.distributed import ProcessGroup
from palimpsest.services.learner.old_logprobs.versioned_model import VersionedModel
from palimpsest.services.learner.sharding.sharded_model import ShardedModel


class VersionedAdapter(VersionedModel):
    """See VersionedModel. All ranks must call its methods together."""

    def __init__(self, model: ShardedModel, store: VersionSource, adapter: Adapter, ranks: ProcessGroup) -> None:
        super().__init__(model, store, adapter)
        self._ranks = ranks

    def load_version(self, version: Version) -> bool:
        """See VersionedModel. Raises VersionMissing on all ranks if one of them does not get the version: the passes
        that follow need all ranks."""
        moved, missing = False, ""
        try:
            moved = super().load_version(version)
        except VersionMissing as error:
            missing = str(error)
        if any(self._ranks.all_gather_object(missing)):
            self._walker.forget()
            raise VersionMissing(missing or f"version {version} is not in the store for another rank")
        return moved
