"""Versions in several objects: all of them are kept, counted, required and removed."""

from pathlib import Path

import pytest
from blake3 import blake3

from palimpsest.common.snapshots.manifest import (
    PARTS_SCHEMA,
    Manifest,
    StoredObject,
    TensorEntry,
    parts_digest,
    seal,
    version_digest,
)
from palimpsest.common.versions import Version
from palimpsest.services.snapshot_store.catalog import Catalog
from palimpsest.services.snapshot_store.quota import QuotaReached
from palimpsest.services.snapshot_store.storage_disk import DiskStorage
from palimpsest.services.snapshot_store.uploads import KEEP_S
from palimpsest.services.snapshot_store.writers import StaleWriter
from tests.unit.snapshot_store.catalogs import Clock, objects, opened, put, upload
from tests.unit.snapshot_store.weights import an_object, chunks, digest_of

SIZE = len(an_object(1))


def in_parts(version: int, *contents: int) -> Manifest:
    """A version with a tensor for each content, each in an object of its own."""
    parts = [StoredObject(digest_of(content), SIZE) for content in contents]
    raws = [content.to_bytes(4, "little") for content in contents]
    entries = [
        TensorEntry(f"w{i}", "int32", (1,), blake3(raw).hexdigest(), i * SIZE, SIZE) for i, raw in enumerate(raws)
    ]
    return Manifest(
        schema=PARTS_SCHEMA, run="test", writer=1, version=Version(version), digest=version_digest(entries),
        encoding="base", object=parts_digest(parts), object_size=SIZE * len(parts), tensors=tuple(entries),
        canaries=(), parts=tuple(parts),
    )  # fmt: skip


async def store(catalog: Catalog, manifest: Manifest) -> bool:
    return await catalog.put_version(manifest, seal(manifest))


async def test_a_sweep_keeps_every_part_and_removes_those_of_a_removed_version(tmp_path: Path) -> None:
    catalog = await opened(tmp_path)
    for version, contents in enumerate([(1, 2), (2, 3), (4, 5)]):
        for content in contents:
            await upload(catalog, content)
        assert await store(catalog, in_parts(version, *contents))
    await catalog.lease("learner", Version(1))
    assert await catalog.sweep() == [0]
    assert objects(tmp_path) == {digest_of(content) for content in (2, 3, 4, 5)}
    again = await opened(tmp_path)
    assert list(again.versions) == [1, 2]
    assert again.used_bytes == 4 * SIZE


@pytest.mark.parametrize("missing", [1, 2])
async def test_a_version_is_refused_until_every_part_is_stored(tmp_path: Path, missing: int) -> None:
    catalog = await opened(tmp_path)
    await upload(catalog, 3 - missing)
    with pytest.raises(KeyError, match=digest_of(missing)):
        await store(catalog, in_parts(0, 1, 2))
    assert list(catalog.versions) == []
    await upload(catalog, missing)
    assert await store(catalog, in_parts(0, 1, 2))
    assert not await store(catalog, in_parts(0, 1, 2)), "a repeat"


async def test_parts_without_a_manifest_are_removed_later(tmp_path: Path) -> None:
    clock = Clock()
    catalog = Catalog(DiskStorage(tmp_path), clock=clock)
    await catalog.open()
    await upload(catalog, 1)
    clock.now = KEEP_S / 2
    await upload(catalog, 2)
    await catalog.sweep()
    assert objects(tmp_path) == {digest_of(1), digest_of(2)}, "the manifest may still arrive"
    clock.now = KEEP_S + 1
    await catalog.sweep()
    assert objects(tmp_path) == {digest_of(2)}


async def test_the_parts_of_a_replaced_writer_are_removed_at_once(tmp_path: Path) -> None:
    catalog = await opened(tmp_path)
    for content in (1, 2):
        await upload(catalog, content)
    await catalog.writers.issue("successor")
    with pytest.raises(StaleWriter):
        await store(catalog, in_parts(0, 1, 2))
    await catalog.sweep()
    assert objects(tmp_path) == set()


async def test_the_limit_counts_each_part_once(tmp_path: Path) -> None:
    catalog = Catalog(DiskStorage(tmp_path), max_bytes=3 * SIZE, clock=Clock())
    await catalog.open()
    await catalog.writers.issue("learner")
    await catalog.lease("learner", Version(0))
    for content in (1, 2):
        await catalog.put_object(digest_of(content), chunks(an_object(content)), size=SIZE)
    assert catalog.used_bytes == 2 * SIZE, "parts that wait for their manifest"
    await store(catalog, in_parts(0, 1, 2))
    await store(catalog, in_parts(1, 2, 1))
    assert catalog.used_bytes == 2 * SIZE
    assert [(each.versions, each.bytes) for each in catalog.holdings()] == [(2, 2 * SIZE)]
    await catalog.put_object(digest_of(3), chunks(an_object(3)), size=SIZE)
    with pytest.raises(QuotaReached):
        await catalog.put_object(digest_of(4), chunks(an_object(4)), size=SIZE)


async def test_versions_in_one_object_and_in_parts_share_objects(tmp_path: Path) -> None:
    catalog = await opened(tmp_path)
    await put(catalog, 0, content=1)
    await upload(catalog, 2)
    await store(catalog, in_parts(1, 1, 2))
    await catalog.lease("learner", Version(1))
    assert await catalog.sweep() == [0]
    assert objects(tmp_path) == {digest_of(1), digest_of(2)}
