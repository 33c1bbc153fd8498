"""python -m services.snapshot_store RUN.toml"""

import asyncio

from common.config import Invocation
from common.program import service
from common.service import Stop, serve
from services.snapshot_store.app import create_app, open_catalogue
from services.snapshot_store.storage_disk import DiskStorage


def body(invocation: Invocation, stop: Stop) -> None:
    """Serve until stopped."""
    config = invocation.config
    storage = DiskStorage(config.snapshot_folder)
    asyncio.run(open_catalogue(storage))  # damage is refused before the port opens
    app = create_app(storage, sweep_s=config.snapshot_store.sweep_s)
    serve(app, config.snapshot_store.host, config.snapshot_store.port, key="snapshot_store", stop=stop)


if __name__ == "__main__":
    service("snapshot_store", body)
