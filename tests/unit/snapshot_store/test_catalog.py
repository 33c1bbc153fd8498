"""Versions and leases in a folder: retention, sweeps, and recovery from a crash."""

import asyncio
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from palimpsest.common.snapshots.manifest import Damaged, seal
from palimpsest.common.versions import Version
from palimpsest.services.snapshot_store.catalog import Catalog, Conflict
from palimpsest.services.snapshot_store.storage_disk import DiskStorage
from palimpsest.services.snapshot_store.uploads import KEEP_S
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


async def test_a_stored_version_has_its_manifest_and_bytes(tmp_path: Path) -> None:
    catalog = await opened(tmp_path)
    assert await put(catalog, 3)
    assert list(catalog.versions) == [3]
    assert await catalog.body(Version(3)) == seal(a_manifest(3, 3))
    assert await DiskStorage(tmp_path).read(catalog.object_key(digest_of(3))) == an_object(3)


async def test_repeated_weights_are_no_new_version(tmp_path: Path) -> None:
    catalog = await opened(tmp_path)
    assert [await put(catalog, 3), await put(catalog, 3)] == [True, False]


async def test_other_weights_for_an_existing_version_are_a_conflict_that_names_both(tmp_path: Path) -> None:
    catalog = await opened(tmp_path)
    await put(catalog, 3, content=1)
    with pytest.raises(Conflict) as conflict:
        await put(catalog, 3, content=2)
    for content in (1, 2):
        assert a_manifest(3, content).digest[:16] in str(conflict.value)
    assert catalog.versions[Version(3)] == a_manifest(3, 1)


async def test_a_version_without_its_object_is_refused(tmp_path: Path) -> None:
    catalog = await opened(tmp_path)
    with pytest.raises(KeyError):
        await announce(catalog, 3, content=3)
    assert catalog.versions == {}


async def test_a_version_with_a_truncated_object_is_refused(tmp_path: Path) -> None:
    catalog = await opened(tmp_path)
    await upload(catalog, 3)
    (tmp_path / "objects" / digest_of(3)).write_bytes(an_object(3)[:-1])
    with pytest.raises(KeyError):
        await announce(catalog, 3, content=3)


async def test_versions_are_listed_in_order_after_a_restart(tmp_path: Path) -> None:
    catalog = await opened(tmp_path)
    for version in (10, 2, 100_000_000):
        await put(catalog, version)
    assert list((await opened(tmp_path)).versions) == [2, 10, 100_000_000]


async def test_18_5_leases_survive_a_restart(tmp_path: Path) -> None:
    catalog = await opened(tmp_path)
    await catalog.lease("learner", Version(4))
    await catalog.lease("replica", Version(2))
    await catalog.lease("learner", Version(5))
    assert (await opened(tmp_path)).leases == {"learner": 5, "replica": 2}


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


@pytest.mark.parametrize("place", [0, 100, -1])
async def test_a_damaged_manifest_is_reported_when_the_store_opens(tmp_path: Path, place: int) -> None:
    await put(await opened(tmp_path), 7)
    path = tmp_path / "versions" / "00000007.json"
    body = bytearray(path.read_bytes())
    body[place] ^= 0xFF
    path.write_bytes(body)
    with pytest.raises(Damaged, match=r"^version 7 \(versions/00000007\.json\): "):
        await opened(tmp_path)


async def test_a_manifest_under_another_number_is_reported_when_the_store_opens(tmp_path: Path) -> None:
    await put(await opened(tmp_path), 7)
    (tmp_path / "versions" / "00000007.json").rename(tmp_path / "versions" / "00000008.json")
    with pytest.raises(Damaged, match=r"^version 8 \(versions/00000008\.json\): its manifest belongs to version 7$"):
        await opened(tmp_path)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"learner": "x"}', b"\xff"])
async def test_damaged_leases_are_reported_when_the_store_opens(tmp_path: Path, body: bytes) -> None:
    (tmp_path / "leases.json").write_bytes(body)
    with pytest.raises(Damaged, match=r"^leases\.json: "):
        await opened(tmp_path)


async def test_files_that_are_no_versions_are_ignored(tmp_path: Path) -> None:
    (tmp_path / "versions").mkdir()
    (tmp_path / "versions" / "README").write_text("mine")
    catalog = await opened(tmp_path)
    await catalog.sweep()
    assert (tmp_path / "versions" / "README").exists()


NUMBERS = st.integers(0, 5)
ACTS = st.one_of(
    st.tuples(st.just("put"), NUMBERS, st.integers(0, 3)),
    st.tuples(st.just("upload"), st.integers(0, 3), st.just(0)),
    st.tuples(st.just("lease"), st.sampled_from(["learner", "replica"]), NUMBERS),
    st.tuples(st.just("sweep"), st.just(0), st.just(0)),
    st.tuples(st.just("restart"), st.just(0), st.just(0)),
)


@settings(max_examples=40, deadline=None)
@given(st.lists(ACTS, max_size=14))
def test_random_events_keep_needed_versions_complete_and_remove_the_rest(
    acts: list[tuple[str, int | str, int]],
) -> None:
    async def play(folder: Path) -> None:
        catalog = await opened(folder)
        standing: dict[int, int] = {}
        leases: dict[str, int] = {}
        waiting: set[int] = set()
        for act, first, second in acts:
            match act:
                case "put":
                    number = int(first)
                    try:
                        assert await put(catalog, number, second) == (number not in standing)
                    except Conflict:
                        assert standing[number] != second
                    waiting.discard(second)
                    standing.setdefault(number, second)
                case "upload":
                    await upload(catalog, int(first))
                    waiting.add(int(first))
                case "lease":
                    await catalog.lease(str(first), Version(second))
                    leases[str(first)] = second
                case "sweep":
                    await catalog.sweep()
                    newest = max(standing, default=0)
                    if leases:
                        lowest = min(leases.values())
                        standing = {v: c for v, c in standing.items() if v >= lowest or v == newest}
                    assert objects(folder) == {digest_of(content) for content in {*standing.values(), *waiting}}
                case "restart":
                    catalog = await opened(folder)
                    waiting.clear()
            assert catalog.versions == {v: a_manifest(v, standing[v]) for v in sorted(standing)}
            assert {digest_of(content) for content in standing.values()} <= objects(folder)
            assert catalog.leases == leases

    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(play(Path(folder)))


class Clock:
    """A clock that only the test advances."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


async def test_a_lease_expires_unless_it_is_renewed(tmp_path: Path) -> None:
    clock = Clock()
    catalog = Catalog(DiskStorage(tmp_path), lease_s=10.0, clock=clock)
    await catalog.lease("learner", Version(3))
    await catalog.lease("stranger", Version(0))
    clock.now = 8.0
    await catalog.lease("learner", Version(4))
    clock.now = 11.0
    await catalog.sweep()
    assert (catalog.leases, (await opened(tmp_path)).leases) == ({"learner": 4}, {"learner": 4})
    clock.now = 19.0
    await catalog.sweep()
    assert catalog.leases == {}


async def test_a_leases_time_begins_again_when_the_store_restarts(tmp_path: Path) -> None:
    await (await opened(tmp_path)).lease("learner", Version(3))
    clock = Clock()
    clock.now = 100.0
    catalog = Catalog(DiskStorage(tmp_path), lease_s=10.0, clock=clock)
    await catalog.open()
    clock.now = 109.0
    await catalog.sweep()
    assert catalog.leases == {"learner": 3}


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
