"""What the snapshot store needs of a place for bytes, for every adapter."""

import asyncio
import multiprocessing
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from multiprocessing.queues import SimpleQueue
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest
from blake3 import blake3

from services.snapshot_store.storage import DigestMismatch, Storage
from services.snapshot_store.storage_disk import DiskStorage


@dataclass(frozen=True)
class Disk:
    """A folder; `open` may be called in any process."""

    folder: Path

    def open(self) -> Storage:
        return DiskStorage(self.folder)


Place = Disk
PLACES: dict[str, Callable[[Path], Place]] = {"disk": Disk}
BAD_KEYS = ["../x", "a/../../x", "/etc", "/etc/passwd", ".hidden", "a/.hidden", "", "a//b", "a/", ".", ".."]


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """An empty place for bytes."""
    return PLACES[request.param](tmp_path / "place")


@pytest.fixture
def storage(place: Place) -> Storage:
    """A storage over it."""
    return place.open()


async def chunks(*pieces: bytes) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


async def broken(*pieces: bytes) -> AsyncIterator[bytes]:
    """A sender that goes away in the middle."""
    for piece in pieces:
        yield piece
    raise ConnectionError("the sender is gone")


async def streamed(storage: Storage, key: str) -> bytes:
    return b"".join([piece async for piece in storage.stream(key)])


async def test_what_is_put_is_there(storage: Storage) -> None:
    assert await storage.put("objects/a", chunks(b"one ", b"", b"two")) == 7
    assert await storage.read("objects/a") == b"one two"
    assert await streamed(storage, "objects/a") == b"one two"
    assert await storage.size("objects/a") == 7


async def test_nothing_at_all_can_be_put(storage: Storage) -> None:
    assert await storage.put("a", chunks()) == 0
    assert (await storage.read("a"), await storage.size("a"), await streamed(storage, "a")) == (b"", 0, b"")


async def test_a_body_of_many_megabytes_is_streamed_in_pieces(storage: Storage) -> None:
    piece = bytes(range(256)) * 4096
    await storage.put("big", chunks(*[piece] * 5))
    pieces = [part async for part in storage.stream("big")]
    assert b"".join(pieces) == piece * 5
    assert max(map(len, pieces)) <= 1 << 20


async def test_putting_again_replaces_the_body(storage: Storage) -> None:
    await storage.put("a", chunks(b"a long first body"))
    await storage.put("a", chunks(b"second"))
    assert await storage.read("a") == b"second"


async def test_what_was_put_is_there_for_the_next_process(place: Place) -> None:
    await place.open().put("a/b", chunks(b"body"))
    assert await place.open().read("a/b") == b"body"


async def test_what_is_not_there_is_none(storage: Storage) -> None:
    assert (await storage.read("a"), await storage.size("a")) == (None, None)


async def test_a_stream_of_what_is_not_there_raises_key_error(storage: Storage) -> None:
    with pytest.raises(KeyError):
        await streamed(storage, "a")


async def test_keys_are_those_with_the_prefix_in_order(storage: Storage) -> None:
    for key in ("b/2", "a/1", "b/1", "b10", "c"):
        await storage.put(key, chunks(b"x"))
    assert await storage.keys("b/") == ["b/1", "b/2"]
    assert await storage.keys("b") == ["b/1", "b/2", "b10"]
    assert await storage.keys("") == ["a/1", "b/1", "b/2", "b10", "c"]
    assert await storage.keys("none") == []


async def test_what_is_deleted_is_gone_and_the_rest_stays(storage: Storage) -> None:
    await storage.put("a/1", chunks(b"x"))
    await storage.put("a/2", chunks(b"y"))
    await storage.delete("a/1")
    assert await storage.keys("") == ["a/2"]


async def test_deleting_what_is_not_there_is_harmless(storage: Storage) -> None:
    await storage.delete("none")
    await storage.delete("no/such/folder")


async def test_creating_stores_the_body(storage: Storage) -> None:
    assert await storage.create("versions/1", b"body")
    assert await storage.read("versions/1") == b"body"


async def test_creating_what_exists_leaves_it_as_it_is(storage: Storage) -> None:
    await storage.create("versions/1", b"first")
    assert not await storage.create("versions/1", b"second")
    assert await storage.read("versions/1") == b"first"
    assert await storage.keys("") == ["versions/1"]


async def test_what_was_deleted_can_be_created_again(storage: Storage) -> None:
    await storage.create("a", b"first")
    await storage.delete("a")
    assert await storage.create("a", b"second")


async def test_of_twenty_that_create_at_once_exactly_one_wins(storage: Storage) -> None:
    won = await asyncio.gather(*(storage.create("versions/1", b"%d" % i) for i in range(20)))
    assert won.count(True) == 1
    assert await storage.read("versions/1") == b"%d" % won.index(True)
    assert await storage.keys("") == ["versions/1"]


KEYS = 40


def create_all(place: Place, name: str, say: "SimpleQueue[str]", go: Event) -> None:
    """Another process: creates every key as fast as it can, then says which it won."""

    async def race() -> list[str]:
        storage = place.open()
        say.put("ready")
        go.wait(60)
        return [key for key in (f"k{i}" for i in range(KEYS)) if await storage.create(key, name.encode())]

    say.put(",".join(asyncio.run(race())))


async def test_of_several_processes_that_create_at_once_exactly_one_wins_each_key(place: Place) -> None:
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
        racer.join(60)
    assert sorted(key for keys in won.values() for key in keys) == sorted(f"k{i}" for i in range(KEYS))
    storage = place.open()
    stored = {key: ((await storage.read(key)) or b"").decode() for key in await storage.keys("")}
    assert stored == {key: name for name, keys in won.items() for key in keys}


async def test_bytes_of_the_announced_digest_are_stored(storage: Storage) -> None:
    assert await storage.put("a", chunks(b"bo", b"dy"), digest=blake3(b"body").hexdigest()) == 4
    assert await storage.read("a") == b"body"


async def test_bytes_of_another_digest_leave_nothing(storage: Storage) -> None:
    with pytest.raises(DigestMismatch, match=f"4 bytes arrived with digest {blake3(b'bodx').hexdigest()}"):
        await storage.put("a", chunks(b"bodx"), digest=blake3(b"body").hexdigest())
    assert await storage.keys("") == []


async def test_bytes_of_another_digest_leave_what_stood_there(storage: Storage) -> None:
    await storage.put("a", chunks(b"old"))
    with pytest.raises(DigestMismatch):
        await storage.put("a", chunks(b"bodx"), digest=blake3(b"body").hexdigest())
    assert await storage.read("a") == b"old"


async def test_an_upload_that_breaks_off_leaves_nothing(storage: Storage) -> None:
    with pytest.raises(ConnectionError):
        await storage.put("a", broken(b"half"))
    assert await storage.keys("") == []


async def test_an_upload_that_breaks_off_leaves_what_stood_there(storage: Storage) -> None:
    await storage.put("a", chunks(b"old"))
    with pytest.raises(ConnectionError):
        await storage.put("a", broken(b"half"))
    assert await storage.read("a") == b"old"


async def test_an_upload_that_is_cancelled_leaves_nothing(storage: Storage) -> None:
    arrived = asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        yield b"half"
        arrived.set()
        await asyncio.Event().wait()

    upload = asyncio.create_task(storage.put("a", slow()))
    await arrived.wait()
    upload.cancel()
    with pytest.raises(asyncio.CancelledError):
        await upload
    assert await storage.keys("") == []


async def test_while_an_upload_is_under_way_nothing_is_seen_of_it(storage: Storage) -> None:
    async def looking() -> AsyncIterator[bytes]:
        yield b"half"
        assert (await storage.read("a"), await storage.keys("")) == (None, [])
        yield b"half"

    assert await storage.put("a", looking()) == 8


async def test_two_uploads_of_one_key_at_once_do_not_mix(storage: Storage) -> None:
    both = asyncio.Barrier(2)

    async def turns(letter: bytes) -> AsyncIterator[bytes]:
        for _ in range(10):
            await both.wait()
            yield letter * 1000

    await asyncio.gather(storage.put("a", turns(b"x")), storage.put("a", turns(b"y")))
    assert await storage.read("a") in (b"x" * 10_000, b"y" * 10_000)


@pytest.mark.parametrize("key", BAD_KEYS)
async def test_a_name_that_would_leave_the_place_is_refused(storage: Storage, key: str) -> None:
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
