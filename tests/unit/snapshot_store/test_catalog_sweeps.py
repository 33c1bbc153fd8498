"""Sweeps of a catalog: they remove unneeded versions and objects, and nothing that an upload or a version needs."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from palimpsest.common.snapshots.manifest import Manifest, Parent, seal
from palimpsest.common.versions import Version
from palimpsest.services.snapshot_store.catalog import Catalog, Conflict, UnknownParent
from palimpsest.services.snapshot_store.storage_disk import DiskStorage
from palimpsest.services.snapshot_store.uploads import KEEP_S
from tests.unit.snapshot_store.catalogs import Clock, announce, objects, opened, put, upload
from tests.unit.snapshot_store.weights import a_manifest, an_object, chunks, digest_of


async def test_18_5_a_sweep_removes_versions_below_every_lease(tmp_path: Path) -> None:
    catalog = await opened(tmp_path)
    for version in range(5):
        await put(catalog, version)
    await catalog.lease("learner", Version(3))
    await catalog.lease("replica", Version(2))
    assert await catalog.sweep() == [0, 1]
    assert list(catalog.versions) == [2, 3, 4]
    assert objects(tmp_path) == {digest_of(content) for content in (2, 3, 4)}
    assert await catalog.body(Version(1)) is None
    assert list((await opened(tmp_path)).versions) == [2, 3, 4]


async def test_without_its_lease_a_version_would_be_swept(tmp_path: Path) -> None:
    catalog = await opened(tmp_path)
    for version in range(3):
        await put(catalog, version)
    await catalog.lease("learner", Version(2))
    await catalog.lease("replica", Version(0))
    assert await catalog.sweep() == []
    catalog._leases.pop("replica")
    assert await catalog.sweep() == [0, 1]


async def test_weights_shared_by_two_versions_stay_as_long_as_one_of_them(tmp_path: Path) -> None:
    catalog = await opened(tmp_path)
    await put(catalog, 0, content=7)
    await put(catalog, 1, content=7)
    await catalog.lease("learner", Version(1))
    assert await catalog.sweep() == [0]
    assert objects(tmp_path) == {digest_of(7)}


async def test_weights_stored_twice_are_removed_with_their_version(tmp_path: Path) -> None:
    """A client that lost the answer sends the weights again; the bytes must not stay forever."""
    catalog = await opened(tmp_path)
    await put(catalog, 0)
    await put(catalog, 0)
    await put(catalog, 1)
    await catalog.lease("learner", Version(1))
    assert await catalog.sweep() == [0]
    assert objects(tmp_path) == {digest_of(1)}


async def test_weights_that_lost_a_conflict_are_swept(tmp_path: Path) -> None:
    catalog = await opened(tmp_path)
    await put(catalog, 0, content=1)
    with pytest.raises(Conflict):
        await put(catalog, 0, content=2)
    await catalog.sweep()
    assert objects(tmp_path) == {digest_of(1)}


async def test_an_object_without_a_manifest_is_swept_after_a_restart(tmp_path: Path) -> None:
    await upload(await opened(tmp_path), 5)
    catalog = await opened(tmp_path)
    await catalog.sweep()
    assert objects(tmp_path) == set()


async def test_an_interrupted_sweep_is_finished_by_the_next_one(tmp_path: Path) -> None:
    """A removal deletes the manifest first, so a crash leaves an object without a manifest."""
    catalog = await opened(tmp_path)
    await put(catalog, 0)
    await put(catalog, 1)
    (tmp_path / "versions" / "00000000.json").unlink()
    catalog = await opened(tmp_path)
    assert list(catalog.versions) == [1]
    assert await catalog.sweep() == []
    assert objects(tmp_path) == {digest_of(1)}


class DiesWhileSweeping(DiskStorage):
    """A storage whose process ends at its second deletion."""

    deletions = 0

    async def delete(self, key: str) -> None:
        self.deletions += 1
        if self.deletions == 2:
            raise SystemExit
        await super().delete(key)


async def test_an_interrupted_sweep_leaves_no_version_without_its_bytes(tmp_path: Path) -> None:
    catalog = await opened(tmp_path)
    for version in range(3):
        await put(catalog, version)
    await catalog.lease("learner", Version(2))
    dying = Catalog(DiesWhileSweeping(tmp_path))
    await dying.open()
    with pytest.raises(SystemExit):
        await dying.sweep()
    after = await opened(tmp_path)
    assert {manifest.object for manifest in after.versions.values()} <= objects(tmp_path)
    assert after.versions.keys() == {1, 2}


async def test_an_upload_in_progress_is_not_swept(tmp_path: Path) -> None:
    catalog = await opened(tmp_path)

    async def sweeping() -> AsyncIterator[bytes]:
        yield an_object(5)[:4]
        await catalog.sweep()
        yield an_object(5)[4:]

    await catalog.put_object(digest_of(5), sweeping())
    assert await announce(catalog, 5, content=5)


async def test_an_upload_that_waits_for_its_manifest_is_not_swept(tmp_path: Path) -> None:
    catalog = await opened(tmp_path)
    await upload(catalog, 5)
    await catalog.sweep()
    assert await announce(catalog, 5, content=5)


async def test_a_sweep_would_remove_unregistered_uploads(tmp_path: Path) -> None:
    catalog = await opened(tmp_path)
    await upload(catalog, 5)
    catalog._uploads.forget(digest_of(5))
    await catalog.sweep()
    with pytest.raises(KeyError):
        await announce(catalog, 5, content=5)


class WaitsAfterLooking(DiskStorage):
    """A storage that lets other tasks run after `size`."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.looked, self.go_on = asyncio.Event(), asyncio.Event()

    async def size(self, key: str) -> int | None:
        size = await super().size(key)
        self.looked.set()
        await self.go_on.wait()
        return size


async def test_no_sweep_runs_between_the_check_of_an_object_and_its_manifest(tmp_path: Path) -> None:
    await upload(await opened(tmp_path), 5)
    storage = WaitsAfterLooking(tmp_path)
    restarted = Catalog(storage)  # the restarted catalog does not know the upload
    await restarted.open()
    announcing = asyncio.create_task(announce(restarted, 5, content=5))
    await storage.looked.wait()
    sweeping = asyncio.create_task(restarted.sweep())
    for _ in range(100):  # runs until it blocks
        await asyncio.sleep(0)
    storage.go_on.set()
    assert await announcing
    await sweeping
    assert objects(tmp_path) == {digest_of(5)}


async def test_an_object_without_a_manifest_is_swept_while_the_store_runs_and_an_upload_never(tmp_path: Path) -> None:
    clock, halfway, go_on = Clock(), asyncio.Event(), asyncio.Event()
    catalog = Catalog(DiskStorage(tmp_path), clock=clock)
    await catalog.open()

    async def slow() -> AsyncIterator[bytes]:
        halfway.set()
        await go_on.wait()
        yield an_object(2)

    await upload(catalog, 1)
    await upload(catalog, 2)
    uploading = asyncio.create_task(catalog.put_object(digest_of(2), slow()))
    await halfway.wait()
    clock.now = KEEP_S / 2
    await catalog.sweep()
    assert objects(tmp_path) >= {digest_of(1), digest_of(2)}
    clock.now = KEEP_S + 1
    await catalog.sweep()
    assert digest_of(1) not in objects(tmp_path)
    assert digest_of(2) in objects(tmp_path)
    go_on.set()
    await uploading
    await catalog.sweep()
    assert objects(tmp_path) == {digest_of(2)}


def a_delta(version: int, parent: Manifest) -> Manifest:
    """The manifest of a delta; its object serves no reader."""
    return replace(
        a_manifest(version, version), encoding="delta", parent=Parent(parent.version, parent.digest), encodings={}
    )


async def test_the_versions_on_which_a_leased_delta_depends_stay(tmp_path: Path) -> None:
    catalog = await opened(tmp_path)
    await put(catalog, 0)
    before = a_manifest(0, 0)
    for version in (1, 2, 3):
        delta = a_delta(version, before)
        await catalog.put_object(delta.object, chunks(an_object(version)))
        await catalog.put_version(delta, seal(delta))
        before = delta
    await put(catalog, 4)
    await catalog.lease("learner", Version(2))
    assert await catalog.sweep() == []
    await catalog.lease("learner", Version(4))
    assert await catalog.sweep() == [0, 1, 2, 3]


@pytest.mark.parametrize("digest", ["", "0" * 64])
async def test_a_delta_to_a_version_that_is_not_there_is_refused(tmp_path: Path, digest: str) -> None:
    catalog = await opened(tmp_path)
    if digest:
        await put(catalog, 0)
    delta = replace(a_delta(1, a_manifest(0, 0)), parent=Parent(Version(0), digest or "1" * 64))
    await catalog.put_object(delta.object, chunks(an_object(1)))
    with pytest.raises(UnknownParent, match="store the version in full"):
        await catalog.put_version(delta, seal(delta))
