"""Read access to a run's storage without a store process, or beside one."""

import asyncio

from blake3 import blake3

from palimpsest.common.bus.claim_check import ClaimLost
from palimpsest.common.config.schema import RunConfig
from palimpsest.services.snapshot_store.claim_check import ClaimCheckBlobs
from palimpsest.services.snapshot_store.storage import Storage
from palimpsest.services.snapshot_store.storage_disk import DiskStorage
from palimpsest.services.snapshot_store.storage_factory import open_storage


async def open_offline(config: RunConfig) -> Storage:
    """Open the run's storage without removing leftovers. Raises UserError."""
    if config.snapshot_store.storage == "folder":
        return DiskStorage(config.snapshot_folder, tidy=False)
    return await open_storage(config)


class StorageClaims:
    """Reads the bodies of long records from storage; see Claims in common/bus/claim_check.py."""

    def __init__(self, storage: Storage, runner: asyncio.Runner) -> None:
        self._storage, self._runner = storage, runner

    def put_claim(self, body: bytes) -> str:
        """Raise NotImplementedError: this access is read-only."""
        raise NotImplementedError(f"cannot write a record of {len(body)} bytes: the access is read-only")

    def claim(self, digest: str) -> bytes:
        """See Claims."""
        body = self._runner.run(self._storage.read(ClaimCheckBlobs.key(digest)))
        if body is None or blake3(body).hexdigest() != digest:
            raise ClaimLost(f"the body {digest} is missing in the store, or damaged")
        return body

    def close(self) -> None:
        """Do nothing; no resource is open."""
