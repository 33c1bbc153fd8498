"""Catalogs in a folder, for tests: open one, upload weights, store versions."""

from pathlib import Path

from palimpsest.common.snapshots.manifest import seal
from palimpsest.services.snapshot_store.catalog import Catalog
from palimpsest.services.snapshot_store.storage_disk import DiskStorage
from tests.unit.snapshot_store.weights import a_manifest, an_object, chunks, digest_of


async def opened(folder: Path) -> Catalog:
    """Open the catalog as a starting store does."""
    catalog = Catalog(DiskStorage(folder))
    await catalog.open()
    if await catalog.writers.newest() is None:
        await catalog.writers.issue("learner")
    return catalog


async def upload(catalog: Catalog, content: int) -> None:
    await catalog.put_object(digest_of(content), chunks(an_object(content)))


async def announce(catalog: Catalog, version: int, content: int) -> bool:
    manifest = a_manifest(version, content)
    return await catalog.put_version(manifest, seal(manifest))


async def put(catalog: Catalog, version: int, content: int | None = None) -> bool:
    """Store a version; its weights are distinct unless given."""
    content = version if content is None else content
    await upload(catalog, content)
    return await announce(catalog, version, content)


def objects(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("objects/*")}


class Clock:
    """A clock that only the test advances."""

    now = 0.0

    def __call__(self) -> float:
        return self.now
