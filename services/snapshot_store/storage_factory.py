"""Opens the storage that a run's configuration names."""

from palimpsest.common.config.schema import RunConfig
from palimpsest.common.file_errors import usable_folder
from palimpsest.common.instruments import report_free_bytes
from palimpsest.services.snapshot_store.storage import Storage
from palimpsest.services.snapshot_store.storage_disk import DiskStorage


async def open_storage(config: RunConfig) -> Storage:
    """Open and check the storage. Raises UserError if it cannot be used."""
    if config.snapshot_store.storage == "folder":
        key = "run.folder" if config.snapshot_store.folder is None else "snapshot_store.folder"
        usable_folder(config.snapshot_folder, key=key)
        report_free_bytes("store", config.snapshot_folder)
        return DiskStorage(config.snapshot_folder)
    from palimpsest.services.snapshot_store.storage_minio import MinioStorage

    storage = MinioStorage(config.snapshot_store, prefix=config.object_prefix)
    await storage.open()
    return storage
