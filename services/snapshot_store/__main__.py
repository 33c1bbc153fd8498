"""python -m palimpsest.services.snapshot_store RUN.toml"""

import asyncio
import os
from urllib.parse import urlsplit

from palimpsest.common.config import Invocation
from palimpsest.common.config.schema import RunConfig
from palimpsest.common.control.access import require_token_off_loopback
from palimpsest.common.control.credentials import open_access
from palimpsest.common.program import service
from palimpsest.common.service import Stop, serve
from palimpsest.services.snapshot_store.app import create_app, open_catalog
from palimpsest.services.snapshot_store.storage import Storage
from palimpsest.services.snapshot_store.storage_factory import open_storage

CLOCK_STEP_S = 3600.0
"""The age of a record's body follows the wall clock of the storage. A step of the clock up to this long removes no body
before `claims_keep_hours`."""


def body(invocation: Invocation, stop: Stop) -> None:
    """Serve until a stop request."""
    config = invocation.config
    section = config.snapshot_store
    access = open_access(os.environ, section.host, urlsplit(section.url).hostname or "")
    require_token_off_loopback(section.host, access, key="snapshot_store")  # before it reads a large storage
    storage = asyncio.run(_open_and_check(config))
    keep_s = section.claims_keep_hours * 3600 + CLOCK_STEP_S
    app = create_app(
        storage,
        sweep_s=section.sweep_s,
        claims_keep_s=keep_s,
        max_bytes=None if section.max_gib is None else int(section.max_gib * 2**30),
        compression=section.compression,
        access=access,
    )
    serve(app, section.host, section.port, key="snapshot_store", stop=stop)


async def _open_and_check(config: RunConfig) -> Storage:
    storage = await open_storage(config)
    await open_catalog(storage)  # raises on damage before the port opens
    return storage


if __name__ == "__main__":
    service("snapshot_store", body)
