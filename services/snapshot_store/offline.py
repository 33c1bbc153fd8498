"""A store's storage as it stands, for those who look at a run from outside while no store serves it, or beside one."""

import asyncio

from blake3 import blake3

from palimpsest.common.bus.claim_check import ClaimLost
from palimpsest.common.config.schema import RunConfig
from palimpsest.services.snapshot_store.claim_check import ClaimCheckBlobs
from palimpsest.services.snapshot_store.storage import Storage
from palimpsest.services.snapshot_store.storage_disk import DiskStorage
from palimpsest.services.snapshot_store.storage_factory import open_storage


async def open_offline(config: RunConfig) -> Storage:
    """The run's storage; nothing in it is tidied up. Raises UserError."""
    if config.snapshot_store.storage == "folder":
        return DiskStorage(config.snapshot_folder, tidy=False)
    return await open_storage(config)


class StorageClaims:
    """Long records' bodies, read where the store keeps them; see Claims in common/bus/claim_check.py."""

    def __init__(self, storage: Storage, runner: asyncio.Runner) -> None:
        self._storage, self._runner = storage, runner

    def put_claim(self, body: bytes) -> str:
        """Never: who looks from outside writes nothing."""
        raise NotImplementedError(f"a record of {len(body)} bytes to write")

    def claim(self, digest: str) -> bytes:
        """See Claims."""
        body = self._runner.run(self._storage.read(ClaimCheckBlobs.key(digest)))
        if body is None or blake3(body).hexdigest() != digest:
            raise ClaimLost(f"the body {digest} is not in the store, or not whole")
        return body

    def close(self) -> None:
        """Nothing is held."""
