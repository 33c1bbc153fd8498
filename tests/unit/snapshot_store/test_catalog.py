"""Versions and leases of a catalog in a folder, and its recovery from a crash."""

import asyncio
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from palimpsest.common.snapshots.manifest import Damaged, seal
from palimpsest.common.versions import Version
from palimpsest.services.snapshot_store.catalog import Catalog, Conflict
from palimpsest.services.snapshot_store.storage_disk import DiskStorage
from tests.unit.snapshot_store.catalogs import Clock, announce, objects, opened, put, upload
from tests.unit.snapshot_store.weights import a_manifest, an_object, digest_of


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
