"""Contract of every storage adapter of the snapshot store."""

import asyncio
import multiprocessing
import os
import time
import uuid
from collections.abc import AsyncIterator
from multiprocessing.queues import SimpleQueue
from multiprocessing.synchronize import Event
from pathlib import Path

import httpx
import pytest
from blake3 import blake3

from palimpsest.services.snapshot_store.storage import DigestMismatch, Storage
from palimpsest.services.snapshot_store.storage_disk import DiskStorage
from palimpsest.services.snapshot_store.storage_minio import MinioStorage
from tests.contract.storages import LARGE, MEBIBYTE, S3, Disk, Place, broken, chunks, streamed
from tests.processes.waiting import LIMIT_S
from tools.backends.minio import Minio

pytestmark = pytest.mark.thorough


BAD_KEYS = ["../x", "a/../../x", "/etc", "/etc/passwd", ".hidden", "a/.hidden", "", "a//b", "a/", ".", ".."]


@pytest.fixture(params=["disk", pytest.param("s3", marks=pytest.mark.servers)])
async def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """An empty folder or bucket prefix."""
    if request.param == "disk":
        return Disk(tmp_path / "place")
    server: Minio = request.getfixturevalue("minio_server")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", server.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", server.secret_key)
    made = S3(server.endpoint, f"{uuid.uuid4().hex}/")
    await MinioStorage(made.config, prefix=made.prefix).open()
    return made


@pytest.fixture
def storage(place: Place) -> Storage:
    """An open storage at `place`."""
    return place.open()


@pytest.fixture(params=[[b"half"], LARGE], ids=["small", "large"])
def half(request: pytest.FixtureRequest) -> list[bytes]:
    """The first pieces of a body."""
    pieces: list[bytes] = request.param
    return pieces


async def test_a_body_that_was_put_can_be_read(storage: Storage) -> None:
    assert await storage.put("objects/a", chunks(b"one ", b"", b"two")) == 7
    assert await storage.read("objects/a") == b"one two"
    assert await streamed(storage, "objects/a") == b"one two"
    assert await storage.size("objects/a") == 7


async def test_a_body_may_be_empty(storage: Storage) -> None:
    assert await storage.put("a", chunks()) == 0
    assert (await storage.read("a"), await storage.size("a"), await streamed(storage, "a")) == (b"", 0, b"")


async def test_a_body_of_many_megabytes_is_streamed_in_pieces(storage: Storage) -> None:
    digest = blake3(b"".join(LARGE)).hexdigest()
    assert await storage.put("big", chunks(*LARGE, b"tail"), digest=None) == 70 * MEBIBYTE + 4
    assert await storage.put("big", chunks(*LARGE), digest=digest) == 70 * MEBIBYTE
    pieces = [part async for part in storage.stream("big")]
    assert b"".join(pieces) == b"".join(LARGE)
    assert max(map(len, pieces)) <= MEBIBYTE
    assert await storage.size("big") == 70 * MEBIBYTE


@pytest.mark.parametrize("size", [(8 << 20) - 1, 8 << 20, (8 << 20) + 1, (32 << 20) - 1, 32 << 20, (32 << 20) + 1])
async def test_a_body_around_the_part_sizes_is_read_unchanged(storage: Storage, size: int) -> None:
    body = (b"".join(LARGE))[:size]
    assert await storage.put("a", chunks(body[:1000], body[1000:]), digest=blake3(body).hexdigest()) == size
    assert blake3((await storage.read("a")) or b"").hexdigest() == blake3(body).hexdigest()


async def test_putting_again_replaces_the_body(storage: Storage) -> None:
    await storage.put("a", chunks(b"a long first body"))
    await storage.put("a", chunks(b"second"))
    assert await storage.read("a") == b"second"


async def test_a_new_storage_reads_the_bodies_of_an_earlier_one(place: Place) -> None:
    await place.open().put("a/b", chunks(b"body"))
    assert await place.open().read("a/b") == b"body"


async def test_a_missing_key_reads_as_none(storage: Storage) -> None:
    assert (await storage.read("a"), await storage.size("a")) == (None, None)


async def test_streaming_a_missing_key_raises_key_error(storage: Storage) -> None:
    with pytest.raises(KeyError):
        await streamed(storage, "a")


async def test_keys_lists_the_keys_with_the_prefix_in_order(storage: Storage) -> None:
    for key in ("b/2", "a/1", "b/1", "b10", "c"):
        await storage.put(key, chunks(b"x"))
    assert await storage.keys("b/") == ["b/1", "b/2"]
    assert await storage.keys("b") == ["b/1", "b/2", "b10"]
    assert await storage.keys("") == ["a/1", "b/1", "b/2", "b10", "c"]
    assert await storage.keys("none") == []


async def test_delete_removes_one_key_only(storage: Storage) -> None:
    await storage.put("a/1", chunks(b"x"))
    await storage.put("a/2", chunks(b"y"))
    await storage.delete("a/1")
    assert await storage.keys("") == ["a/2"]


async def test_deleting_a_missing_key_does_nothing(storage: Storage) -> None:
    await storage.delete("none")
    await storage.delete("no/such/folder")


async def test_creating_stores_the_body(storage: Storage) -> None:
    assert await storage.create("versions/1", b"body")
    assert await storage.read("versions/1") == b"body"


async def test_create_does_not_replace_an_existing_body(storage: Storage) -> None:
    await storage.create("versions/1", b"first")
    assert not await storage.create("versions/1", b"second")
    assert await storage.read("versions/1") == b"first"
    assert await storage.keys("") == ["versions/1"]


async def test_a_deleted_key_can_be_created_again(storage: Storage) -> None:
    await storage.create("a", b"first")
    await storage.delete("a")
    assert await storage.create("a", b"second")


async def test_exactly_one_of_twenty_concurrent_creates_succeeds(storage: Storage) -> None:
    won = await asyncio.gather(*(storage.create("versions/1", b"%d" % i) for i in range(20)))
    assert won.count(True) == 1
    assert await storage.read("versions/1") == b"%d" % won.index(True)
    assert await storage.keys("") == ["versions/1"]


KEYS = 40


def create_all(place: Place, name: str, say: "SimpleQueue[str]", go: Event) -> None:
    """Process body: create every key, then send the keys that this process created."""

    async def race() -> list[str]:
        storage = place.open()
        say.put("ready")
        go.wait(LIMIT_S)
        return [key for key in (f"k{i}" for i in range(KEYS)) if await storage.create(key, name.encode())]

    say.put(",".join(asyncio.run(race())))


async def test_exactly_one_of_several_processes_creates_each_key(place: Place) -> None:
    context = multiprocessing.get_context("spawn")
    go = context.Event()
    answers = [context.SimpleQueue() for _ in range(3)]
    racers = [
        context.Process(target=create_all, args=(place, f"racer {i}", answer, go), daemon=True)
        for i, answer in enumerate(answers)
    ]
    for racer in racers:
        racer.start()
    assert [answer.get() for answer in answers] == ["ready"] * 3
    go.set()
    won = {f"racer {i}": set(filter(None, answer.get().split(","))) for i, answer in enumerate(answers)}
    for racer in racers:
        racer.join(LIMIT_S)
    assert sorted(key for keys in won.values() for key in keys) == sorted(f"k{i}" for i in range(KEYS))
    storage = place.open()
    stored = {key: ((await storage.read(key)) or b"").decode() for key in await storage.keys("")}
    assert stored == {key: name for name, keys in won.items() for key in keys}


async def test_a_body_with_the_announced_digest_is_stored(storage: Storage) -> None:
    assert await storage.put("a", chunks(b"bo", b"dy"), digest=blake3(b"body").hexdigest()) == 4
    assert await storage.read("a") == b"body"


async def test_a_body_with_another_digest_is_not_stored(storage: Storage, half: list[bytes]) -> None:
    body = b"".join(half)
    with pytest.raises(DigestMismatch, match=f"received {len(body)} bytes with digest {blake3(body).hexdigest()}"):
        await storage.put("a", chunks(*half), digest=blake3(b"body").hexdigest())
    assert await storage.keys("") == []


async def test_a_body_with_another_digest_does_not_replace_the_old_body(storage: Storage, half: list[bytes]) -> None:
    await storage.put("a", chunks(b"old"))
    with pytest.raises(DigestMismatch):
        await storage.put("a", chunks(*half), digest=blake3(b"body").hexdigest())
    assert await storage.read("a") == b"old"


async def test_a_failed_upload_stores_nothing(storage: Storage, half: list[bytes]) -> None:
    with pytest.raises(ConnectionError, match="the sender is gone"):
        await storage.put("a", broken(half))
    assert await storage.keys("") == []


async def test_a_failed_upload_does_not_replace_the_old_body(storage: Storage, half: list[bytes]) -> None:
    await storage.put("a", chunks(b"old"))
    with pytest.raises(ConnectionError, match="the sender is gone"):
        await storage.put("a", broken(half))
    assert await storage.read("a") == b"old"


async def test_a_cancelled_upload_stores_nothing(storage: Storage, half: list[bytes]) -> None:
    arrived = asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        for piece in half:
            yield piece
        arrived.set()
        await asyncio.Event().wait()

    upload = asyncio.create_task(storage.put("a", slow()))
    await arrived.wait()
    upload.cancel()
    with pytest.raises(asyncio.CancelledError):
        await upload
    assert await storage.keys("") == []


async def test_an_unfinished_upload_is_invisible(storage: Storage, half: list[bytes]) -> None:
    async def looking() -> AsyncIterator[bytes]:
        for piece in half:
            yield piece
        assert (await storage.read("a"), await storage.keys("")) == (None, [])
        for piece in half:
            yield piece

    assert await storage.put("a", looking()) == 2 * len(b"".join(half))


@pytest.mark.parametrize("length", [1000, 4 * MEBIBYTE])
async def test_concurrent_uploads_of_one_key_do_not_mix(storage: Storage, length: int) -> None:
    both = asyncio.Barrier(2)

    async def turns(letter: bytes) -> AsyncIterator[bytes]:
        for _ in range(10):
            await both.wait()
            yield letter * length

    await asyncio.gather(storage.put("a", turns(b"x")), storage.put("a", turns(b"y")))
    body = await storage.read("a") or b""
    assert (len(body), set(body)) in ((10 * length, set(b"x")), (10 * length, set(b"y")))


async def test_older_lists_the_keys_above_an_age(storage: Storage) -> None:
    for key in ("claims/b", "claims/a", "objects/a"):
        await storage.put(key, chunks(b"x"))
    assert await storage.older("claims/", 3600.0) == []
    async with asyncio.timeout(LIMIT_S):  # S3 timestamps are in whole seconds
        while await storage.older("claims/", 1.0) != ["claims/a", "claims/b"]:
            await asyncio.sleep(0.05)
    assert await storage.older("claims/", 3600.0) == []


async def test_putting_a_body_again_resets_its_age(storage: Storage) -> None:
    for key in ("claims/a", "claims/b"):
        await storage.put(key, chunks(b"x"))
    stored = time.monotonic()
    await until(stored + 3.0)
    again = time.monotonic()
    await storage.put("claims/a", chunks(b"x"))
    while True:
        asked = time.monotonic()
        found = await storage.older("claims/", asked - stored - ROUNDED_S)
        if time.monotonic() - asked < again - stored - 2 * ROUNDED_S:  # else claims/a may have reached this age, too
            break
    assert found == ["claims/b"]


ROUNDED_S = 1.0
"""S3 timestamps are in whole seconds."""


async def until(moment: float) -> None:
    """Wait until the time: the tests need bodies of a certain age."""
    while time.monotonic() < moment:
        await asyncio.sleep(0.05)


async def test_an_address_gives_read_access_to_one_body(storage: Storage) -> None:
    await storage.put("a/b", chunks(b"one two"))
    address = await storage.address("a/b")
    if isinstance(storage, DiskStorage):
        assert address is None
        return
    assert address is not None
    async with httpx.AsyncClient() as client:
        assert (await client.get(address)).content == b"one two"
        assert (await client.get(address, headers={"Range": "bytes=4-"})).content == b"two"
        assert (await client.put(address, content=b"x")).status_code == 403
        assert (await client.get(address.replace("/b?", "/c?"))).status_code == 403
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in address


@pytest.mark.parametrize("key", BAD_KEYS)
async def test_a_key_that_is_not_a_plain_relative_path_is_refused(storage: Storage, key: str) -> None:
    with pytest.raises(ValueError, match="is not a key"):
        await storage.put(key, chunks(b"x"))
    with pytest.raises(ValueError, match="is not a key"):
        await storage.create(key, b"x")
    with pytest.raises(ValueError, match="is not a key"):
        await storage.read(key)
    with pytest.raises(ValueError, match="is not a key"):
        await storage.size(key)
    with pytest.raises(ValueError, match="is not a key"):
        await streamed(storage, key)
    with pytest.raises(ValueError, match="is not a key"):
        await storage.delete(key)
