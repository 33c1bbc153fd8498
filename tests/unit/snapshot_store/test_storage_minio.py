"""The MinIO storage: conditional creation, lost replies, and unfinished uploads."""

import asyncio
import itertools
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest
from blake3 import blake3
from urllib3.exceptions import ProtocolError

from palimpsest.common.user_error import UserError
from palimpsest.services.snapshot_store import upload_reader
from palimpsest.services.snapshot_store.storage import DigestMismatch, Unavailable
from palimpsest.services.snapshot_store.storage_minio import PART, SMALL, MinioStorage
from tests.servers.stores import LIMIT_S
from tests.unit.snapshot_store.minio_storage import BUCKET, chunks, unfinished

pytestmark = pytest.mark.servers


@pytest.mark.parametrize("size", [10, SMALL + PART])
async def test_without_the_digest_check_wrong_bytes_would_be_stored(
    storage: MinioStorage, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    announced, wrong = blake3(b"right").hexdigest(), b"x" * size
    with pytest.raises(DigestMismatch):
        await storage.put("a", chunks(wrong), digest=announced)
    assert await storage.size("a") is None

    class Blind:
        def update(self, _chunk: bytes) -> None: ...

        def hexdigest(self) -> str:
            return announced

    monkeypatch.setattr(upload_reader, "blake3", Blind)
    await storage.put("a", chunks(wrong), digest=announced)
    assert await storage.size("a") == size


def without_the_condition(storage: MinioStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    real = storage._once._put_object

    def plain(bucket: str, name: str, body: bytes, headers: dict[str, Any]) -> object:
        del headers["If-None-Match"]
        return real(bucket, name, body, headers)

    monkeypatch.setattr(storage._once, "_put_object", plain)


async def test_without_the_condition_a_second_create_would_succeed(
    storage: MinioStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_the_condition(storage, monkeypatch)
    assert [await storage.create("a", b"first"), await storage.create("a", b"second")] == [True, True]
    assert await storage.read("a") == b"second"


async def test_an_s3_that_ignores_the_condition_is_refused_at_the_start(
    storage: MinioStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_the_condition(storage, monkeypatch)
    with pytest.raises(UserError, match="ignores If-None-Match"):
        await storage.open()
    assert await storage.keys("") == []


def losing_replies(storage: MinioStorage, monkeypatch: pytest.MonkeyPatch, replies: int, *, land: bool) -> None:
    """Lose the answers to the first requests of `create`; with `land`, the first request takes effect."""
    real, count = storage._once._put_object, itertools.count()

    def lossy(*arguments: Any) -> object:
        number = next(count)
        if number < replies:
            if land and number == 0:
                real(*arguments)
            raise ProtocolError("Connection aborted.")
        return real(*arguments)

    monkeypatch.setattr(storage._once, "_put_object", lossy)


@pytest.mark.parametrize("land", [True, False])
async def test_a_create_with_a_lost_reply_detects_its_success(
    storage: MinioStorage, monkeypatch: pytest.MonkeyPatch, land: bool
) -> None:
    losing_replies(storage, monkeypatch, 1, land=land)
    assert await storage.create("a", b"body")
    assert await storage.read("a") == b"body"


async def test_a_create_with_a_lost_reply_is_distinct_from_another_of_the_same_bytes(
    storage: MinioStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    another = MinioStorage(storage._config, prefix=storage._prefix)
    assert await another.create("a", b"body")
    losing_replies(storage, monkeypatch, 1, land=False)
    assert not await storage.create("a", b"body")


async def test_a_create_without_any_answer_is_unavailable_and_may_have_succeeded(
    storage: MinioStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    losing_replies(storage, monkeypatch, 3, land=True)
    with pytest.raises(Unavailable, match=r"ProtocolError: Connection aborted\."):
        await storage.create("a", b"body")
    assert not await storage.create("a", b"body")
    assert await storage.read("a") == b"body"


async def test_an_upload_that_fails_leaves_no_parts(storage: MinioStorage) -> None:
    seen = []

    async def failing() -> AsyncIterator[bytes]:
        yield bytes(2 * PART)
        seen.append(unfinished(storage, "a"))
        raise ConnectionError

    with pytest.raises(ConnectionError):
        await storage.put("a", failing())
    assert (seen, unfinished(storage, "a")) == ([1], 0)


async def test_parts_of_a_killed_store_are_removed_by_the_next_upload(storage: MinioStorage) -> None:
    name = f"{storage._prefix}a"
    upload = storage._client._create_multipart_upload(BUCKET, name, {})
    storage._client._upload_part(BUCKET, name, bytes(SMALL), None, upload, 1)
    assert unfinished(storage, "a") == 1
    await storage.put("a", chunks(bytes(2 * PART)))
    assert unfinished(storage, "a") == 0


async def test_the_event_loop_runs_during_s3_requests(storage: MinioStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    loop, ours, waited = asyncio.get_running_loop(), threading.get_ident(), set[str]()

    def watch(name: str) -> None:
        real = getattr(storage._client, name)

        def call(*arguments: Any, **more: Any) -> object:
            assert threading.get_ident() != ours, f"{name} holds the loop up"
            asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop).result(
                LIMIT_S
            )  # the event loop runs during the call
            waited.add(name)
            return real(*arguments, **more)

        monkeypatch.setattr(storage._client, name, call)

    calls = ("put_object", "get_object", "stat_object", "remove_object")
    for name in calls:
        watch(name)
    await storage.put("a", chunks(*[bytes(1 << 20)] * 30))
    assert await storage.size("a") == 30 << 20
    assert sum([len(piece) async for piece in storage.stream("a")]) == 30 << 20
    await storage.delete("a")
    assert waited == set(calls)
