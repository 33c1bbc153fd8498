"""A storage outage: every reply has a message, no data is lost, and sweeps continue afterward."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from palimpsest.common.snapshots.manifest import seal
from palimpsest.common.user_error import ExitCode, UserError
from palimpsest.services.snapshot_store.app import open_catalog
from palimpsest.services.snapshot_store.storage import Unavailable
from palimpsest.services.snapshot_store.storage_disk import DiskStorage
from tests.processes.waiting import LIMIT_S
from tests.unit.snapshot_store.test_app import announce, assert_error, metric, send, store
from tests.unit.snapshot_store.weights import a_manifest, an_object, digest_of


class Flaky(DiskStorage):
    """A folder that can be unreachable; a creation in `last_words` succeeds without an answer."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.out, self.last_words, self.refused = False, False, 0

    def _check(self) -> None:
        if self.out:
            self.refused += 1
            raise Unavailable("the folder is out of reach")

    async def put(self, key: str, chunks: AsyncIterator[bytes], *, digest: str | None = None) -> int:
        self._check()
        return await super().put(key, chunks, digest=digest)

    async def create(self, key: str, body: bytes) -> bool:
        self._check()
        if self.last_words:
            await super().create(key, body)
            raise Unavailable("the answer was lost")
        return await super().create(key, body)

    async def read(self, key: str) -> bytes | None:
        self._check()
        return await super().read(key)

    async def size(self, key: str) -> int | None:
        self._check()
        return await super().size(key)

    async def keys(self, prefix: str) -> list[str]:
        self._check()
        return await super().keys(prefix)


async def test_every_request_that_needs_the_storage_is_503(tmp_path: Path) -> None:
    storage = Flaky(tmp_path)
    async with store(storage) as client:
        await send(client, 1)
        await announce(client, 0, 1)
        storage.out = True
        failures = metric("storage_failures_total")
        replies = [
            await send(client, 2),
            await announce(client, 1, 1),
            await client.get(f"/v1/objects/{digest_of(1)}"),
            await client.get("/v1/versions/0"),
            await client.put("/v1/leases/learner", json={"lowest": 0}),
            await client.put(f"/v1/claims/{digest_of(1)}", content=an_object(1)),
            await client.get(f"/v1/claims/{digest_of(1)}"),
        ]
        for reply in replies:
            message = assert_error(reply, 503, "storage_unavailable", retryable=True)
            assert message == "the folder is out of reach"
            assert reply.headers["retry-after"] == "1"
        assert metric("storage_failures_total") == failures + len(replies)
        storage.out = False
        assert (await client.get("/v1/versions/0")).content == seal(a_manifest(0, 1))


async def test_a_creation_without_an_answer_can_be_repeated(tmp_path: Path) -> None:
    storage = Flaky(tmp_path)
    async with store(storage) as client:
        await send(client, 1)
        storage.last_words = True
        assert_error(await announce(client, 0, 1), 503, "storage_unavailable", retryable=True)
        storage.last_words = False
        assert (await announce(client, 0, 1)).status_code == 200
        await send(client, 2)
        assert_error(await announce(client, 0, 2), 409, "version_conflict")
        assert [entry["version"] for entry in (await client.get("/v1/versions")).json()["versions"]] == [0]


async def test_weights_are_not_swept_while_the_state_of_their_manifest_is_unknown(tmp_path: Path) -> None:
    storage = Flaky(tmp_path)
    async with store(storage, sweep_s=0.005) as client:
        await send(client, 1)
        storage.last_words = True
        await announce(client, 0, 1)
        storage.last_words = False
        await swept_once(client)
        assert (await client.get(f"/v1/objects/{digest_of(1)}")).status_code == 200


async def test_sweeps_continue_after_an_outage(tmp_path: Path) -> None:
    storage = Flaky(tmp_path)
    async with store(storage, sweep_s=0.005) as client:
        for version in range(2):
            await send(client, version)
            await announce(client, version, version)
        await client.put("/v1/leases/learner", json={"lowest": 0})
        storage.out = True
        async with asyncio.timeout(LIMIT_S):
            while storage.refused < 3:
                await asyncio.sleep(0.005)
        storage.out = False
        await swept_once(client)


async def swept_once(client: httpx.AsyncClient) -> None:
    """Wait for a complete sweep, which removes weights without a manifest."""
    garbage = digest_of(99)
    path = f"/v1/objects/{garbage}"
    await client.put(path, content=an_object(99))
    await client.put("/v1/versions/99", content=seal(a_manifest(99, 99)))
    await client.put("/v1/leases/learner", json={"lowest": 100})
    await send(client, 98)
    await announce(client, 100, 98)
    async with asyncio.timeout(LIMIT_S):
        while (await client.get(path)).status_code != 404:
            await asyncio.sleep(0.005)


async def test_an_unreadable_storage_is_refused_at_the_start(tmp_path: Path) -> None:
    storage = Flaky(tmp_path)
    storage.out = True
    with pytest.raises(UserError, match="the snapshot store's storage cannot be read: the folder is out of") as error:
        await open_catalog(storage)
    assert error.value.code is ExitCode.UNAVAILABLE
