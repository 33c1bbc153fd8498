"""The limit on the store's bytes: what is removed for an upload, what is refused, and who holds the bytes."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from hypothesis import given, settings, strategies as st

from palimpsest.common.snapshots.manifest import Manifest, Parent, seal
from palimpsest.common.versions import Version
from palimpsest.services.snapshot_store import catalog as catalogs_module
from palimpsest.services.snapshot_store.app import create_app
from palimpsest.services.snapshot_store.catalog import LEASE_S, Catalog
from palimpsest.services.snapshot_store.quota import Quota, QuotaReached, holdings
from palimpsest.services.snapshot_store.retention import removable
from palimpsest.services.snapshot_store.storage_disk import DiskStorage
from tests.unit.snapshot_store.catalogs import Clock, objects, put
from tests.unit.snapshot_store.test_catalog_sweeps import a_delta
from tests.unit.snapshot_store.weights import a_manifest, an_object, chunks, digest_of

SIZE = len(an_object(1))


async def limited(folder: Path, versions: int, clock: Clock | None = None) -> Catalog:
    """A catalog with room for this many versions."""
    catalog = Catalog(DiskStorage(folder), max_bytes=versions * SIZE, clock=clock or Clock())
    await catalog.open()
    await catalog.writers.issue("learner")
    return catalog


def parent(manifests: dict[Version, Manifest], version: Version) -> Parent | None:
    return manifests[version].parent if version in manifests else None


async def store(catalog: Catalog, version: int) -> None:
    await catalog.put_object(digest_of(version), chunks(an_object(version)), size=SIZE)
    manifest = a_manifest(version, version)
    await catalog.put_version(manifest, seal(manifest))


async def test_an_upload_removes_what_no_lease_and_no_pin_holds(tmp_path: Path) -> None:
    catalog = await limited(tmp_path, 3)
    for version in range(3):
        await store(catalog, version)
    await catalog.lease("learner", Version(2))
    await catalog.pin(Version(0), "best", seconds=None)
    await store(catalog, 3)  # without a sweep in between
    assert list(catalog.versions) == [0, 2, 3]
    assert catalog.used_bytes == 3 * SIZE


async def test_an_upload_without_room_is_refused_and_the_disk_does_not_fill(tmp_path: Path) -> None:
    catalog = await limited(tmp_path, 3)
    await catalog.lease("learner", Version(0))
    for version in range(3):
        await store(catalog, version)
    before = objects(tmp_path)
    with pytest.raises(QuotaReached, match=r"lease learner from version 0 holds 3 versions"):
        await store(catalog, 3)
    assert objects(tmp_path) == before
    await catalog.lease("learner", Version(1))
    await store(catalog, 3)
    assert list(catalog.versions) == [1, 2, 3]


async def test_without_the_limit_the_same_upload_is_stored(tmp_path: Path) -> None:
    catalog = Catalog(DiskStorage(tmp_path))
    await catalog.open()
    await catalog.writers.issue("learner")
    await catalog.lease("learner", Version(0))
    for version in range(4):
        await put(catalog, version)
    assert len(objects(tmp_path)) == 4


async def test_an_expired_lease_makes_room(tmp_path: Path) -> None:
    clock = Clock()
    catalog = await limited(tmp_path, 2, clock)
    await catalog.lease("gone", Version(0))
    await store(catalog, 0)
    await store(catalog, 1)
    with pytest.raises(QuotaReached):
        await store(catalog, 2)
    clock.now = LEASE_S / 2
    await catalog.lease("learner", Version(1))
    clock.now = LEASE_S + 1
    await store(catalog, 2)
    assert list(catalog.versions) == [1, 2]


async def test_two_uploads_at_once_do_not_share_the_same_room(tmp_path: Path) -> None:
    catalog = await limited(tmp_path, 1)
    halfway, go_on = asyncio.Event(), asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        halfway.set()
        await go_on.wait()
        yield an_object(1)

    first = asyncio.create_task(catalog.put_object(digest_of(1), slow(), size=SIZE))
    await halfway.wait()
    with pytest.raises(QuotaReached):
        await catalog.put_object(digest_of(2), chunks(an_object(2)), size=SIZE)
    go_on.set()
    await first
    assert catalog.used_bytes == SIZE


async def test_without_reservations_two_uploads_at_once_exceed_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Quota, "reserve", Quota.fits)
    catalog = await limited(tmp_path, 1)
    halfway, go_on = asyncio.Event(), asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        halfway.set()
        await go_on.wait()
        yield an_object(1)

    first = asyncio.create_task(catalog.put_object(digest_of(1), slow(), size=SIZE))
    await halfway.wait()
    await catalog.put_object(digest_of(2), chunks(an_object(2)), size=SIZE)
    go_on.set()
    await first
    assert catalog.used_bytes > SIZE


async def test_a_failed_upload_gives_its_room_back(tmp_path: Path) -> None:
    catalog = await limited(tmp_path, 1)

    async def broken() -> AsyncIterator[bytes]:
        yield an_object(1)[:3]
        raise ConnectionError

    with pytest.raises(ConnectionError):
        await catalog.put_object(digest_of(1), broken(), size=SIZE)
    assert catalog.used_bytes == 0
    await store(catalog, 2)


async def test_an_upload_takes_no_more_than_it_announced(tmp_path: Path) -> None:
    catalog = await limited(tmp_path, 5)
    with pytest.raises(ValueError, match="longer than its 3 bytes"):
        await catalog.put_object(digest_of(1), chunks(an_object(1)), size=3)
    assert objects(tmp_path) == set()


async def test_without_the_count_of_arriving_bytes_a_longer_upload_is_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalogs_module, "_at_most", lambda _size, pieces: pieces)
    catalog = await limited(tmp_path, 5)
    await catalog.put_object(digest_of(1), chunks(an_object(1)), size=3)
    assert objects(tmp_path) == {digest_of(1)}


async def test_weights_that_are_stored_already_need_no_room(tmp_path: Path) -> None:
    catalog = await limited(tmp_path, 1)
    await store(catalog, 0)
    await store(catalog, 0)
    assert catalog.used_bytes == SIZE


@settings(deadline=None)
@given(
    st.sets(st.integers(0, 9), min_size=1),
    st.dictionaries(st.sampled_from(["learner", "other"]), st.integers(0, 10).map(Version), min_size=1),
    st.sets(st.integers(0, 9)),
)
def test_what_a_holder_holds_alone_is_what_its_release_removes(
    numbers: set[int], leases: dict[str, Version], pinned: set[int]
) -> None:
    manifests = {}
    for number in sorted(numbers):
        own = a_manifest(number, number)
        if number - 1 in manifests and number % 3:
            own = a_delta(number, manifests[Version(number - 1)])
        manifests[Version(number)] = own
    pins = {Version(version): {"best": None} for version in pinned & numbers}
    found = holdings(manifests, leases, pins)
    assert len(found) == len(leases) + len(pins)
    assert all(0 <= each.freed <= each.bytes for each in found)
    kept = manifests.keys() - removable(manifests.keys(), leases, pinned=pins, parents=lambda v: parent(manifests, v))
    for each in found:
        if each.who.startswith("pin"):
            others = {version for version in pins if f"of version {version}" not in each.who}
            gone = removable(manifests.keys(), leases, pinned=others, parents=lambda v: parent(manifests, v))
            assert each.freed == sum(manifests[version].object_size for version in kept & gone)


async def test_the_reply_names_holders_and_commands_and_the_room_can_be_polled(tmp_path: Path) -> None:
    app = create_app(DiskStorage(tmp_path), sweep_s=3600, max_bytes=2 * SIZE)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://s") as client:
        await client.post("/v1/writers", json={"holder": "learner"})
        for version in range(2):
            await client.put(f"/v1/objects/{digest_of(version)}", content=an_object(version))
            await client.put(f"/v1/versions/{version}", content=seal(a_manifest(version, version)))
        await client.put("/v1/leases/learner", json={"lowest": 1})
        await client.put("/v1/pins/0", json={"name": "best"})
        reply = await client.put(f"/v1/objects/{digest_of(2)}", content=an_object(2))
        assert (reply.status_code, reply.json()["code"]) == (507, "quota_reached")
        assert "palimpsest pin RUN 0 --name=best --release" in reply.json()["message"]
        assert "raise snapshot_store.max_gib" in reply.json()["message"]
        assert (await client.get("/v1/quota", params={"bytes": SIZE})).status_code == 507
        await client.delete("/v1/pins/0", params={"name": "best"})
        assert (await client.get("/v1/quota", params={"bytes": SIZE})).status_code == 200
        assert (await client.put(f"/v1/objects/{digest_of(2)}", content=an_object(2))).status_code == 201
        assert (await client.get("/v1/status")).json()["quota"]["max_bytes"] == 2 * SIZE
        without_length = await client.put(f"/v1/objects/{digest_of(3)}", content=chunks(an_object(3)))
        assert (without_length.status_code, without_length.json()["code"]) == (411, "length_required")
