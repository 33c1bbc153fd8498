"""HTTP interface of the store: every status code of app.py."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import msgspec
import pytest

from palimpsest.common.metrics import REGISTRY
from palimpsest.common.snapshots.manifest import seal
from palimpsest.common.user_error import ExitCode, UserError
from palimpsest.services.snapshot_store.app import create_app, open_catalog
from palimpsest.services.snapshot_store.storage import Storage
from palimpsest.services.snapshot_store.storage_disk import DiskStorage
from tests.processes.waiting import LIMIT_S
from tests.unit.snapshot_store.weights import a_manifest, an_object, digest_of

SELDOM = 3600.0


@asynccontextmanager
async def store(storage: Storage, *, sweep_s: float = SELDOM) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(storage, sweep_s=sweep_s)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://s") as client:
        if (await client.get("/v1/writers")).json()["epoch"] is None:
            await client.post("/v1/writers", json={"holder": "learner"})
        yield client


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a store over an empty folder that does not sweep."""
    async with store(DiskStorage(tmp_path)) as opened:
        yield opened


async def send(client: httpx.AsyncClient, content: int) -> httpx.Response:
    return await client.put(f"/v1/objects/{digest_of(content)}", content=an_object(content))


async def announce(client: httpx.AsyncClient, version: int, content: int) -> httpx.Response:
    return await client.put(f"/v1/versions/{version}", content=seal(a_manifest(version, content)))


def assert_error(reply: httpx.Response, status: int, code: str, *, retryable: bool = False) -> str:
    body = reply.json()
    assert (reply.status_code, body["code"], body["retryable"]) == (status, code, retryable)
    message: str = body["message"]
    return message


def metric(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(f"palimpsest_store_{name}", labels) or 0.0


async def test_an_object_is_stored(client: httpx.AsyncClient) -> None:
    reply = await send(client, 1)
    assert (reply.status_code, reply.json()) == (201, {"size": len(an_object(1))})


async def test_an_object_is_returned_unchanged(client: httpx.AsyncClient) -> None:
    await send(client, 1)
    reply = await client.get(f"/v1/objects/{digest_of(1)}")
    assert (reply.status_code, reply.content) == (200, an_object(1))
    assert reply.headers["content-type"] == "application/octet-stream"


async def test_an_object_that_does_not_match_its_name_is_refused_and_not_kept(client: httpx.AsyncClient) -> None:
    refused = metric("refused_total", reason="digest_mismatch")
    reply = await client.put(f"/v1/objects/{digest_of(1)}", content=an_object(2))
    assert digest_of(2) in assert_error(reply, 422, "digest_mismatch", retryable=True)
    assert (await client.get(f"/v1/objects/{digest_of(1)}")).status_code == 404
    assert metric("refused_total", reason="digest_mismatch") == refused + 1


async def test_a_missing_object_is_404(client: httpx.AsyncClient) -> None:
    assert_error(await client.get(f"/v1/objects/{digest_of(1)}"), 404, "object_missing")


@pytest.mark.parametrize("name", ["abc", "A" * 64, "g" * 64, "0" * 63, "0" * 65, "..%2Fleases.json"])
async def test_an_object_name_that_is_no_digest_is_refused(client: httpx.AsyncClient, name: str) -> None:
    assert (await client.put(f"/v1/objects/{name}", content=b"x")).status_code in (404, 422)
    assert (await client.get(f"/v1/objects/{name}")).status_code in (404, 422)


async def test_a_new_version_is_201_and_a_repeated_one_200(client: httpx.AsyncClient) -> None:
    await send(client, 1)
    assert [(await announce(client, 0, 1)).status_code for _ in range(2)] == [201, 200]


async def test_a_manifest_is_returned_as_sealed(client: httpx.AsyncClient) -> None:
    await send(client, 1)
    await announce(client, 0, 1)
    reply = await client.get("/v1/versions/0")
    assert (reply.status_code, reply.content) == (200, seal(a_manifest(0, 1)))


async def test_other_weights_for_an_existing_version_are_409(client: httpx.AsyncClient) -> None:
    await send(client, 1)
    await send(client, 2)
    await announce(client, 0, 1)
    message = assert_error(await announce(client, 0, 2), 409, "version_conflict")
    assert message.endswith("versions never change; take the next number")
    assert (await client.get("/v1/versions/0")).content == seal(a_manifest(0, 1))


async def test_a_version_without_its_object_is_424(client: httpx.AsyncClient) -> None:
    message = assert_error(await announce(client, 0, 1), 424, "object_missing", retryable=True)
    assert message == f"object {digest_of(1)} is missing or incomplete: send it first"
    assert (await client.get("/v1/versions/0")).status_code == 404


async def test_a_damaged_manifest_is_422(client: httpx.AsyncClient) -> None:
    await send(client, 1)
    body = seal(a_manifest(0, 1)).replace(b'"run":"test"', b'"run":"tost"')
    reply = await client.put("/v1/versions/0", content=body)
    assert assert_error(reply, 422, "damaged_manifest") == "the manifest contradicts its seal"


async def test_a_manifest_of_another_version_is_422(client: httpx.AsyncClient) -> None:
    await send(client, 1)
    reply = await client.put("/v1/versions/5", content=seal(a_manifest(4, 1)))
    assert assert_error(reply, 422, "other_version") == "the manifest belongs to version 4, not 5"


@pytest.mark.parametrize("number", ["-1", "one", "1.5"])
async def test_an_invalid_version_number_is_422(client: httpx.AsyncClient, number: str) -> None:
    assert (await client.get(f"/v1/versions/{number}")).status_code == 422


async def test_a_missing_version_is_404(client: httpx.AsyncClient) -> None:
    assert assert_error(await client.get("/v1/versions/9"), 404, "version_missing") == "no version 9"


async def test_versions_are_listed_with_their_digests_in_order(client: httpx.AsyncClient) -> None:
    for version in (2, 0, 1):
        await send(client, version)
        await announce(client, version, version)
    listed = (await client.get("/v1/versions")).json()
    assert listed == {"versions": [{"version": v, "digest": a_manifest(v, v).digest} for v in range(3)]}


async def test_a_lease_is_taken_and_shown(client: httpx.AsyncClient) -> None:
    reply = await client.put("/v1/leases/learner", json={"lowest": 4})
    assert (reply.status_code, reply.json()) == (200, {"lowest": 4})
    assert (await client.get("/v1/status")).json()["leases"] == {"learner": 4}
    assert metric("oldest_needed_version") == 4


@pytest.mark.parametrize("holder", [".hidden", "a b", "a" * 65, "ä", "-x"])
async def test_a_lease_without_a_proper_holder_is_422(client: httpx.AsyncClient, holder: str) -> None:
    assert_error(await client.put(f"/v1/leases/{holder}", json={"lowest": 4}), 422, "invalid_request")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        b"[]",
        b'{"lowest": "4"}',
        b'{"lowest": 4, "highest": 5}',
        b'{"lowest": 4.5}',
        b'{"\xff": 4}',
        b'{"lowest": -5}',
        b'{"lowest": ' + b"9" * 260 + b"}",
        b"[" * 30_000,
    ],
)
async def test_an_invalid_lease_is_422(client: httpx.AsyncClient, body: bytes) -> None:
    assert_error(await client.put("/v1/leases/learner", content=body), 422, "bad_lease")
    assert (await client.get("/v1/status")).json()["leases"] == {}


async def test_a_number_without_a_fraction_is_an_integer(client: httpx.AsyncClient) -> None:
    """As in JSON Schema, which the service's OpenAPI document uses."""
    assert (await client.put("/v1/leases/learner", content=b'{"lowest": 4.0}')).json() == {"lowest": 4}
    for body in (b'{"lowest": 4.5}', b'{"lowest": 1e300}', b'{"lowest": "4"}', b'{"lowest": true}'):
        assert_error(await client.put("/v1/leases/learner", content=body), 422, "bad_lease")


async def test_a_lease_can_be_deleted(client: httpx.AsyncClient) -> None:
    await client.put("/v1/leases/learner", json={"lowest": 4})
    assert (await client.delete("/v1/leases/learner")).status_code == 204
    assert (await client.get("/v1/status")).json()["leases"] == {}
    assert_error(await client.delete("/v1/leases/learner"), 404, "lease_missing")


@pytest.mark.parametrize(
    "path", [f"/v1/versions/{'9' * 260}", f"/v1/writers/{2**53}", "/v1/objects/" + "0" * 64 + "%0A"]
)
async def test_numbers_and_digests_in_a_path_are_bounded(client: httpx.AsyncClient, path: str) -> None:
    assert_error(await client.get(path), 422, "invalid_request")


@pytest.mark.parametrize("digest", ["0" * 64 + "\n", "0" * 63, "A" * 64])
async def test_a_checkpoint_needs_a_strict_digest(client: httpx.AsyncClient, digest: str) -> None:
    assert_error(await client.put("/v1/checkpoints/0/1", json={"digest": digest}), 422, "bad_commit")


@pytest.mark.parametrize("body", [b"[" * 100_000, b'{"seal": "", "manifest": ' + b"[" * 100_000])
async def test_a_nested_manifest_is_422(client: httpx.AsyncClient, body: bytes) -> None:
    assert_error(await client.put("/v1/versions/0", content=body), 422, "damaged_manifest")


async def test_a_manifest_over_the_limit_is_413(client: httpx.AsyncClient) -> None:
    headers = {"Content-Length": str(50 * 2**20)}
    assert_error(await client.put("/v1/versions/0", content=b"x", headers=headers), 413, "too_large")


async def test_versions_that_no_lease_needs_are_swept_while_the_store_runs(tmp_path: Path) -> None:
    async with store(DiskStorage(tmp_path), sweep_s=0.005) as client:
        for version in range(3):
            await send(client, version)
            await announce(client, version, version)
        await client.put("/v1/leases/learner", json={"lowest": 1})
        async with asyncio.timeout(LIMIT_S):
            while (await client.get("/v1/versions/0")).status_code != 404:
                await asyncio.sleep(0.005)
        assert (await client.get(f"/v1/objects/{digest_of(0)}")).status_code == 404
        assert [v["version"] for v in (await client.get("/v1/versions")).json()["versions"]] == [1, 2]


class Full(DiskStorage):
    """A folder on a full disk."""

    async def put(self, key: str, chunks: AsyncIterator[bytes], *, digest: str | None = None) -> int:
        return Path("/dev/full").write_bytes(b"x")

    async def create(self, key: str, body: bytes) -> bool:
        return bool(Path("/dev/full").write_bytes(b"x"))


async def test_writing_to_a_full_disk_is_507(tmp_path: Path) -> None:
    async with store(DiskStorage(tmp_path)) as client:
        await send(client, 1)
    async with store(Full(tmp_path)) as client:
        replies = [
            await send(client, 2),
            await announce(client, 0, 1),
            await client.put("/v1/leases/learner", json={"lowest": 0}),
        ]
    for reply in replies:
        assert "the disk of the snapshot store is full" in assert_error(reply, 507, "disk_full", retryable=True)


class Broken(DiskStorage):
    """A disk with another fault."""

    async def put(self, key: str, chunks: AsyncIterator[bytes], *, digest: str | None = None) -> int:
        raise OSError(5, "Input/output error")


async def test_another_disk_error_is_500(tmp_path: Path) -> None:
    async with store(Broken(tmp_path)) as client:
        assert (await send(client, 2)).status_code == 500


async def test_the_store_is_ready_once_the_catalog_is_open(tmp_path: Path) -> None:
    app = create_app(DiskStorage(tmp_path), sweep_s=SELDOM)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://s") as client:
        before = await client.get("/readyz")
        async with app.router.lifespan_context(app):
            after = await client.get("/readyz")
    assert (before.status_code, before.json()["waiting_for"]) == (503, "the catalog")
    assert after.status_code == 200


async def test_the_status_lists_stored_versions(client: httpx.AsyncClient) -> None:
    for version in (3, 5):
        await send(client, version)
        await announce(client, version, version)
    assert (await client.get("/v1/status")).json() == {
        "service": "snapshot_store",
        "waiting_for": None,
        "outages": [],
        "versions": 2,
        "oldest": 3,
        "newest": 5,
        "bytes": len(an_object(3)) + len(an_object(5)),
        "leases": {},
        "quota": {"max_bytes": None, "used_bytes": len(an_object(3)) + len(an_object(5)), "held": []},
    }


async def test_bytes_are_counted_in_both_directions(client: httpx.AsyncClient) -> None:
    before = metric("received_bytes_total"), metric("sent_bytes_total")
    await send(client, 1)
    await client.get(f"/v1/objects/{digest_of(1)}")
    size = len(an_object(1))
    assert (metric("received_bytes_total"), metric("sent_bytes_total")) == (before[0] + size, before[1] + size)


async def test_a_folder_with_a_damaged_manifest_is_refused_by_version(tmp_path: Path) -> None:
    async with store(DiskStorage(tmp_path)) as client:
        await send(client, 1)
        await announce(client, 6, 1)
    path = tmp_path / "versions" / "00000006.json"
    path.write_bytes(path.read_bytes().replace(b'"run":"test"', b'"run":"tost"'))
    with pytest.raises(UserError) as error:
        await open_catalog(DiskStorage(tmp_path))
    assert error.value.code is ExitCode.DAMAGED
    assert "version 6 (versions/00000006.json): the manifest contradicts its seal" in str(error.value)


async def test_a_folder_with_damaged_leases_is_refused(tmp_path: Path) -> None:
    (tmp_path / "leases.json").write_bytes(msgspec.json.encode(["learner"]))
    with pytest.raises(UserError, match=r"leases\.json") as error:
        await open_catalog(DiskStorage(tmp_path))
    assert error.value.code is ExitCode.DAMAGED
