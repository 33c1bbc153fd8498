"""Bodies of long records: each is kept for a fixed time after it was last sent."""

import asyncio
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from blake3 import blake3

from palimpsest.services.snapshot_store.claim_check import ClaimCheckBlobs
from palimpsest.services.snapshot_store.storage import DigestMismatch
from palimpsest.services.snapshot_store.storage_disk import DiskStorage
from tests.processes.waiting import LIMIT_S
from tests.unit.snapshot_store.test_app import assert_error, metric, store
from tests.unit.snapshot_store.weights import chunks

KEEP_S = 100.0
BODY = b"the body of a long record"
DIGEST = blake3(BODY).hexdigest()


def age(folder: Path, digest: str, age_s: float) -> None:
    """Set the age of a body, in seconds."""
    then = time.time() - age_s
    os.utime(folder / "claims" / digest, (then, then))


def standing(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("claims/*")}


async def test_a_body_is_removed_after_its_time(tmp_path: Path) -> None:
    claims = ClaimCheckBlobs(DiskStorage(tmp_path))
    await claims.put(DIGEST, chunks(BODY))
    age(tmp_path, DIGEST, KEEP_S / 2)
    assert await claims.sweep(KEEP_S) == 0
    assert standing(tmp_path) == {DIGEST}
    age(tmp_path, DIGEST, KEEP_S + 5)
    assert await claims.sweep(KEEP_S) == 1
    assert standing(tmp_path) == set()


async def test_a_body_sent_again_is_kept_longer(tmp_path: Path) -> None:
    claims = ClaimCheckBlobs(DiskStorage(tmp_path))
    await claims.put(DIGEST, chunks(BODY))
    age(tmp_path, DIGEST, KEEP_S + 5)
    await claims.put(DIGEST, chunks(BODY))
    assert await claims.sweep(KEEP_S) == 0


async def test_old_weights_and_manifests_are_not_removed_as_claims(tmp_path: Path) -> None:
    storage = DiskStorage(tmp_path)
    for key in ("objects/a", "versions/a", "leases.json"):
        await storage.put(key, chunks(b"x"))
        os.utime(tmp_path / key, (0, 0))
    assert await ClaimCheckBlobs(storage).sweep(KEEP_S) == 0
    assert await storage.keys("") == ["leases.json", "objects/a", "versions/a"]


async def test_a_body_of_another_digest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DigestMismatch):
        await ClaimCheckBlobs(DiskStorage(tmp_path)).put(DIGEST, chunks(b"another"))
    assert standing(tmp_path) == set()


class Stepped(DiskStorage):
    """A storage that blocks before a removal and before the answer of `older` until released."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.removing, self.remove = asyncio.Event(), asyncio.Event()
        self.looked, self.answer = asyncio.Event(), asyncio.Event()
        self.answer.set()

    async def older(self, prefix: str, age_s: float) -> list[str]:
        found = await super().older(prefix, age_s)
        self.looked.set()
        await self.answer.wait()
        return found

    async def delete(self, key: str) -> None:
        self.removing.set()
        await self.remove.wait()
        await super().delete(key)


async def old_claim(folder: Path) -> tuple[ClaimCheckBlobs, Stepped]:
    storage = Stepped(folder)
    claims = ClaimCheckBlobs(storage)
    await claims.put(DIGEST, chunks(BODY))
    age(folder, DIGEST, KEEP_S + 5)
    return claims, storage


async def test_a_body_sent_between_the_listing_and_the_removal_stays(tmp_path: Path) -> None:
    claims, storage = await old_claim(tmp_path)
    storage.remove.set()
    storage.answer.clear()
    sweeping = asyncio.create_task(claims.sweep(KEEP_S))
    await storage.looked.wait()
    await claims.put(DIGEST, chunks(BODY))
    storage.answer.set()
    assert await sweeping == 0
    assert standing(tmp_path) == {DIGEST}


async def test_a_body_that_is_being_sent_is_not_removed(tmp_path: Path) -> None:
    claims, storage = await old_claim(tmp_path)
    storage.remove.set()

    async def sweeping() -> AsyncIterator[bytes]:
        yield BODY
        assert await claims.sweep(KEEP_S) == 0

    await claims.put(DIGEST, sweeping())
    assert standing(tmp_path) == {DIGEST}
    assert await claims.sweep(KEEP_S) == 0


async def test_a_body_sent_during_its_removal_is_stored_again(tmp_path: Path) -> None:
    claims, storage = await old_claim(tmp_path)
    sweeping = asyncio.create_task(claims.sweep(KEEP_S))
    await storage.removing.wait()
    sending = asyncio.create_task(claims.put(DIGEST, chunks(BODY)))
    for _ in range(100):  # runs until it blocks
        await asyncio.sleep(0)
    storage.remove.set()
    assert (await sweeping, await sending) == (1, len(BODY))
    assert standing(tmp_path) == {DIGEST}


async def test_a_claim_is_stored_returned_and_counted(tmp_path: Path) -> None:
    before = metric("claim_bytes_total")
    async with store(DiskStorage(tmp_path)) as client:
        for _ in range(2):
            reply = await client.put(f"/v1/claims/{DIGEST}", content=BODY)
            assert (reply.status_code, reply.json()) == (201, {"size": len(BODY)})
        reply = await client.get(f"/v1/claims/{DIGEST}")
        assert (reply.status_code, reply.content) == (200, BODY)
    assert metric("claim_bytes_total") == before + 2 * len(BODY)


async def test_a_missing_claim_is_404(tmp_path: Path) -> None:
    async with store(DiskStorage(tmp_path)) as client:
        message = assert_error(await client.get(f"/v1/claims/{DIGEST}"), 404, "claim_missing")
        assert message == f"no body {DIGEST}: it was never sent, or was removed because of its age"
        assert_error(await client.put(f"/v1/claims/{DIGEST}", content=b"x"), 422, "digest_mismatch", retryable=True)
        assert (await client.get("/v1/claims/abc")).status_code == 422


async def test_old_claims_are_swept_while_the_store_runs(tmp_path: Path) -> None:
    async with store(DiskStorage(tmp_path), sweep_s=0.005) as client:
        await client.put(f"/v1/claims/{DIGEST}", content=BODY)
    age(tmp_path, DIGEST, 193 * 3600)  # older than the default retention of claims
    async with store(DiskStorage(tmp_path), sweep_s=0.005) as client:
        await gone(client)


async def gone(client: httpx.AsyncClient) -> None:
    async with asyncio.timeout(LIMIT_S):
        while (await client.get(f"/v1/claims/{DIGEST}")).status_code != 404:
            await asyncio.sleep(0.005)
