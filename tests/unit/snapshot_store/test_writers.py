"""Write access: each request gets a new epoch, and writes of earlier epochs are refused."""

import asyncio
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import msgspec
import pytest
from hypothesis import given, settings, strategies as st

from palimpsest.common import failpoints
from palimpsest.common.snapshots.manifest import Manifest, seal
from palimpsest.common.user_error import ExitCode, UserError
from palimpsest.common.versions import Version
from palimpsest.services.snapshot_store.app import create_app, open_catalog
from palimpsest.services.snapshot_store.storage_disk import DiskStorage
from palimpsest.services.snapshot_store.writers import CheckpointCommit, StaleWriter, UnknownWriter, Writers
from tests.unit.snapshot_store.test_app import assert_error, metric, send
from tests.unit.snapshot_store.weights import a_manifest

ONE, TWO = "1" * 64, "2" * 64


@asynccontextmanager
async def store(folder: Path) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a new store in this folder."""
    app = create_app(DiskStorage(folder), sweep_s=3600.0)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://s") as client:
        yield client


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    async with store(tmp_path) as opened:
        yield opened


async def begin(client: httpx.AsyncClient, holder: str = "learner") -> int:
    reply = await client.post("/v1/writers", json={"holder": holder})
    assert reply.status_code == 201
    epoch: int = reply.json()["epoch"]
    return epoch


async def announce(client: httpx.AsyncClient, version: int, content: int, *, writer: int) -> httpx.Response:
    await send(client, content)
    manifest = msgspec.structs.replace(a_manifest(version, content), writer=writer)
    return await client.put(f"/v1/versions/{version}", content=seal(manifest))


async def commit(client: httpx.AsyncClient, version: int, writer: int, digest: str = ONE) -> httpx.Response:
    return await client.put(f"/v1/checkpoints/{version}/{writer}", json={"digest": digest})


async def standing(client: httpx.AsyncClient) -> list[tuple[int, int, str]]:
    found = (await client.get("/v1/checkpoints")).json()["checkpoints"]
    return [(entry["version"], entry["writer"], entry["digest"]) for entry in found]


async def test_epochs_count_from_one_and_survive_a_restart(tmp_path: Path) -> None:
    async with store(tmp_path) as client:
        assert (await client.get("/v1/writers")).json() == {"epoch": None, "holder": None}
        assert [await begin(client, "first"), await begin(client, "second")] == [1, 2]
    async with store(tmp_path) as client:
        assert (await client.get("/v1/writers")).json() == {"epoch": 2, "holder": "second"}
        assert await begin(client, "third") == 3


@pytest.mark.parametrize(
    "body", [b"", b"{}", b'{"holder": ""}', b'{"holder": 1}', b'{"holder": "a", "epoch": 7}', b"\xff"]
)
async def test_a_holder_without_a_name_is_refused(client: httpx.AsyncClient, body: bytes) -> None:
    assert_error(await client.post("/v1/writers", content=body), 422, "bad_holder")
    assert (await client.get("/v1/writers")).json()["epoch"] is None


async def test_only_the_newest_writer_is_confirmed(client: httpx.AsyncClient) -> None:
    assert_error(await client.get("/v1/writers/1"), 409, "writer_unknown")
    await begin(client, "first")
    assert (await client.get("/v1/writers/1")).json() == {"epoch": 1}
    await begin(client, "second")
    message = assert_error(await client.get("/v1/writers/1"), 409, "fenced")
    assert message == "writer 1 (first) was replaced by writer 2 (second)"
    for unknown in (0, 3):
        message = assert_error(await client.get(f"/v1/writers/{unknown}"), 409, "writer_unknown")
        assert message == f"this store never issued epoch {unknown}; its newest is 2"


async def test_a_version_of_a_replaced_writer_is_refused_and_its_weights_are_removed(
    client: httpx.AsyncClient, tmp_path: Path
) -> None:
    await begin(client, "first")
    assert (await announce(client, 0, 0, writer=1)).status_code == 201
    await begin(client, "second")
    before = metric("refused_total", reason="fenced")
    message = assert_error(await announce(client, 1, 1, writer=1), 409, "fenced")
    assert message == "writer 1 (first) was replaced by writer 2 (second)"
    assert metric("refused_total", reason="fenced") == before + 1
    assert_error(await announce(client, 0, 0, writer=1), 409, "fenced")  # the same version from the replaced writer
    assert_error(await announce(client, 1, 1, writer=3), 409, "writer_unknown")
    assert [entry["version"] for entry in (await client.get("/v1/versions")).json()["versions"]] == [0]
    catalog = await open_catalog(DiskStorage(tmp_path))
    await catalog.sweep()
    assert [path.name for path in tmp_path.glob("objects/*")] == [a_manifest(0, 0).object]


async def test_the_newest_writer_may_repeat_a_version_of_an_earlier_one(client: httpx.AsyncClient) -> None:
    await begin(client)
    await announce(client, 0, 0, writer=1)
    await begin(client)
    assert (await announce(client, 0, 0, writer=2)).status_code == 200
    assert_error(await announce(client, 0, 5, writer=2), 409, "version_conflict")


async def test_a_checkpoint_is_valid_from_its_commit_to_its_withdrawal(tmp_path: Path) -> None:
    async with store(tmp_path) as client:
        await begin(client)
        assert (await commit(client, 10, 1, TWO)).status_code == 201
        assert (await commit(client, 9, 1)).status_code == 201
        assert (await commit(client, 9, 1)).status_code == 200
        message = assert_error(await commit(client, 9, 1, TWO), 409, "checkpoint_conflict")
        assert message.startswith("writer 1 has committed a checkpoint of version 9 with digest 1111")
    async with store(tmp_path) as client:
        assert await standing(client) == [(9, 1, ONE), (10, 1, TWO)]
        for _ in range(2):  # a repeated withdrawal has no effect
            assert (await client.delete("/v1/checkpoints/9/1?by=1")).status_code == 200
        assert await standing(client) == [(10, 1, TWO)]


async def test_a_replaced_writer_neither_commits_nor_withdraws(client: httpx.AsyncClient) -> None:
    await begin(client, "first")
    await commit(client, 3, 1)
    await begin(client, "second")
    assert_error(await commit(client, 4, 1), 409, "fenced")
    assert_error(await commit(client, 3, 1), 409, "fenced")
    assert_error(await client.delete("/v1/checkpoints/3/1?by=1"), 409, "fenced")
    assert await standing(client) == [(3, 1, ONE)]
    assert (await commit(client, 3, 2, TWO)).status_code == 201
    assert (await client.delete("/v1/checkpoints/3/1?by=2")).status_code == 200
    assert await standing(client) == [(3, 2, TWO)]


async def test_without_fencing_a_replaced_writer_could_write(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    await begin(client)
    await begin(client)
    monkeypatch.setenv(failpoints.VARIABLE, "store.skip_fencing")
    assert (await client.get("/v1/writers/1")).status_code == 200
    assert (await announce(client, 1, 1, writer=1)).status_code == 201
    assert (await commit(client, 4, 1)).status_code == 201


@pytest.mark.parametrize("body", [b"", b"{}", b'{"digest": "12"}', b'{"digest": 7}', b"\xff"])
async def test_a_commit_without_a_digest_is_refused(client: httpx.AsyncClient, body: bytes) -> None:
    await begin(client)
    assert_error(await client.put("/v1/checkpoints/3/1", content=body), 422, "bad_commit")
    assert await standing(client) == []


async def test_a_damaged_commit_is_refused_when_the_store_opens_and_a_damaged_holder_is_not(tmp_path: Path) -> None:
    async with store(tmp_path) as client:
        await begin(client)
        await commit(client, 3, 1)
    (tmp_path / "writers" / "00000001.json").write_bytes(b"{")
    catalog = await open_catalog(DiskStorage(tmp_path))
    newest = await catalog.writers.newest()
    assert newest is not None
    assert (newest.epoch, newest.holder) == (1, "its name is damaged")
    (tmp_path / "checkpoints" / "00000003-00000001.json").write_bytes(b"{")
    with pytest.raises(UserError, match=r"checkpoints/00000003-00000001\.json: ") as error:
        await open_catalog(DiskStorage(tmp_path))
    assert error.value.code is ExitCode.DAMAGED


async def test_concurrent_requests_get_distinct_epochs(client: httpx.AsyncClient) -> None:
    assert sorted(await asyncio.gather(*(begin(client, f"l{i}") for i in range(40)))) == list(range(1, 41))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=24))
def test_concurrent_requests_to_several_stores_over_one_storage_get_distinct_epochs(asked: list[int]) -> None:
    """The storage decides, so a replaced store issues no epoch twice."""

    async def race(folder: Path) -> None:
        stores = [Writers(DiskStorage(folder), asyncio.Lock()) for _ in range(4)]
        issued = await asyncio.gather(*(stores[i].issue(f"learner at {i}") for i in asked))
        assert sorted(issued) == list(range(1, len(asked) + 1))
        for i in range(4):
            newest = await stores[i].newest()
            assert newest is not None
            assert newest.epoch == len(asked)
            await stores[i].check(len(asked))
            for epoch in range(1, len(asked)):
                with pytest.raises(StaleWriter):
                    await stores[i].check(epoch)

    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(race(Path(folder)))


class WaitsBeforeCreating(DiskStorage):
    """A storage that lets other tasks run between the check of a writer and its write."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.checked, self.go_on = asyncio.Event(), asyncio.Event()

    async def create(self, key: str, body: bytes) -> bool:
        if not key.startswith("writers/"):
            self.checked.set()
            await self.go_on.wait()
        return await super().create(key, body)


@pytest.mark.parametrize("what", ["version", "checkpoint"])
async def test_no_epoch_is_issued_between_the_check_of_a_writer_and_its_write(tmp_path: Path, what: str) -> None:
    storage = WaitsBeforeCreating(tmp_path)
    catalog = await open_catalog(storage)
    await catalog.writers.issue("first")

    async def pieces() -> AsyncIterator[bytes]:
        yield b"x"

    if what == "version":
        manifest: Manifest = msgspec.structs.replace(a_manifest(0, 0), object_size=1)
        await storage.put(f"objects/{manifest.object}", pieces())
        writing = asyncio.create_task(catalog.put_version(manifest, seal(manifest)))
    else:
        writing = asyncio.create_task(catalog.writers.commit(Version(0), 1, ONE))
    await storage.checked.wait()
    taking_over = asyncio.create_task(catalog.writers.issue("second"))
    for _ in range(100):  # runs until it blocks
        await asyncio.sleep(0)
    assert not taking_over.done()
    storage.go_on.set()
    assert await writing
    assert await taking_over == 2


ACTS = st.lists(
    st.one_of(
        st.tuples(st.just("begin"), st.just(0), st.just(0)),
        st.tuples(st.just("commit"), st.integers(0, 4), st.integers(0, 3)),
        st.tuples(st.just("withdraw"), st.integers(0, 4), st.integers(0, 3)),
        st.tuples(st.just("restart"), st.just(0), st.just(0)),
    ),
    max_size=25,
)


@settings(max_examples=60, deadline=None)
@given(ACTS)
def test_random_events_accept_commits_of_the_newest_writer_only(acts: list[tuple[str, int, int]]) -> None:
    async def play(folder: Path) -> None:
        writers = Writers(DiskStorage(folder), asyncio.Lock())
        newest, counts = 0, set()
        for act, version, back in acts:
            epoch = max(0, newest - back)
            expected = UnknownWriter if epoch == 0 else StaleWriter if epoch < newest else None
            match act:
                case "begin":
                    newest += 1
                    assert await writers.issue("learner") == newest
                case "commit" if expected is None:
                    assert await writers.commit(Version(version), epoch, ONE) == ((version, epoch) not in counts)
                    counts.add((version, epoch))
                case "commit":
                    assert expected is not None
                    with pytest.raises(expected):
                        await writers.commit(Version(version), epoch, ONE)
                case "withdraw" if expected is None:
                    await writers.withdraw(Version(version), max(1, epoch - 1), by=epoch)
                    counts.discard((version, max(1, epoch - 1)))
                case "restart":
                    writers = Writers(DiskStorage(folder), asyncio.Lock())
                    await writers.open()
            found = await writers.committed()
            assert found == [CheckpointCommit(Version(v), w, ONE) for v, w in sorted(counts)]

    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(play(Path(folder)))
