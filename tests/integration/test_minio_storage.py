"""The snapshot store over a real MinIO: outages, damage and sweeps. Tests that kill the store run it as a process."""

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from blake3 import blake3

from palimpsest.common.snapshots.client import ClaimMissing, SnapshotClient, VersionMissing
from palimpsest.common.snapshots.manifest import Damaged
from palimpsest.common.snapshots.retrying_http import Upload
from palimpsest.common.versions import Version
from tests.learner_parts.rank_threads import ShardedStore
from tests.servers.backends import s3_client
from tests.servers.minio_stores import CANARIES, MEBIBYTE, Process, Store, a_writer, plain, put, some, tamper
from tests.servers.stored_weights import fetched
from tests.servers.stores import LIMIT_S, eventually
from tools.backends.minio import Minio

pytestmark = pytest.mark.servers


@pytest.fixture
def serve(minio_server: Minio, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Store]]:
    """Serve stores; settings: keys of [snapshot_store]."""
    with ExitStack() as served:

        def start(*, minio: Minio = minio_server, claims_keep_s: float = 3600.0, **settings: Any) -> Store:
            monkeypatch.setenv("MINIO_ACCESS_KEY", minio.access_key)
            monkeypatch.setenv("MINIO_SECRET_KEY", minio.secret_key)
            return served.enter_context(Store(minio, claims_keep_s=claims_keep_s, **settings))

        yield start


@pytest.fixture
def store(serve: Callable[..., Store]) -> Store:
    return serve()


@pytest.fixture
def start_process(tmp_path: Path, minio_server: Minio) -> Iterator[Callable[..., Process]]:
    """Start stores as processes."""
    made: list[Process] = []

    def start(*more: str) -> Process:
        made.append(Process(tmp_path, minio_server, *more))
        made[-1].start()
        made[-1].ready()
        return made[-1]

    yield start
    for process in made:
        process.kill()


@pytest.fixture
def own_minio(own_minio: Minio) -> Minio:
    """A running MinIO that a test may kill."""
    if not own_minio.running:
        own_minio.start()
    return own_minio


@pytest.mark.parametrize("presign", [True, False])
def test_versions_survive_a_restart_bit_for_bit(start_process: Callable[..., Process], presign: bool) -> None:
    store = start_process(f"--snapshot_store.presign={str(presign).lower()}")
    with SnapshotClient(store.url) as client:
        manifests = [put(client, version, some(version, size=13 * MEBIBYTE)) for version in range(2)]
        store.kill()
        store.start()
        store.ready()
        for version in range(2):
            assert plain(fetched(client, version)) == plain(some(version, size=13 * MEBIBYTE))
        assert client.versions() == [0, 1]
    assert store.objects() == {manifest.object: manifest.object_size for manifest in manifests}
    sent = sum(manifest.object_size for manifest in manifests)
    assert store.metric("sent_bytes_total") == (0 if presign else sent)
    assert store.metric("redirected_reads_total") == (2 if presign else 0)


@pytest.mark.parametrize("presign", [True, False])
def test_a_version_in_parts_is_stored_and_read(serve: Callable[..., Store], presign: bool) -> None:
    store, weights = serve(presign=presign), some(1, parts=5, size=2 * MEBIBYTE)
    with SnapshotClient(store.url) as client:
        manifest = ShardedStore(client, weights).put(0, weights, writer=a_writer(client))
        assert len(manifest.objects) == 2
        assert sorted(plain(fetched(client, 0))) == sorted(plain(weights))
        assert store.objects() == {part.digest: part.size for part in manifest.objects}


def test_an_upload_succeeds_although_minio_is_killed_and_restarted(
    serve: Callable[..., Store], own_minio: Minio, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, tensors, seen = serve(minio=own_minio), some(1, parts=5, size=16 * MEBIBYTE), []
    killed, again = threading.Event(), threading.Event()
    data = own_minio.folder / "data"

    def fail_once() -> None:
        """Kill MinIO when parts have arrived, and restart it after the store has recorded the failure."""
        parts, failures = data / ".minio.sys" / "multipart", store.metric("storage_failures_total")
        eventually(lambda: any(path.is_file() and path.name.startswith("part.") for path in parts.rglob("*")))
        own_minio.kill()
        killed.set()
        eventually(lambda: store.metric("storage_failures_total") > failures)
        own_minio.start()
        seen.append((store.objects(), store.objects("versions/")))
        again.set()

    def chunks(self: Upload) -> Iterator[bytes]:
        """Send nothing after the first half until MinIO is killed."""
        for number, chunk in enumerate(every_chunk(self)):
            if number == 40:
                assert killed.wait(LIMIT_S)
            yield chunk

    every_chunk = Upload.chunks
    monkeypatch.setattr(Upload, "chunks", chunks)
    with SnapshotClient(store.url) as client:
        outage = threading.Thread(target=fail_once)
        outage.start()
        manifest = client.put("t", Version(0), iter(tensors), CANARIES, writer=a_writer(client))
        outage.join(LIMIT_S)
        assert killed.is_set()
        assert again.is_set()
        assert store.objects() == {manifest.object: manifest.object_size}
        assert plain(fetched(client, 0)) == plain(tensors)
    assert seen[0][1] == {}, "no manifest before its object"


def test_all_other_calls_succeed_after_an_outage_of_minio(serve: Callable[..., Store], own_minio: Minio) -> None:
    store = serve(minio=own_minio)
    failures = store.metric("storage_failures_total")
    with SnapshotClient(store.url) as client:
        put(client, 0, some(0))
        body = os.urandom(100_000)
        digest = client.put_claim(body)
        calls: list[Callable[[], object]] = [
            lambda: put(client, 1, some(1)),
            lambda: fetched(client, 0),
            lambda: client.manifest(Version(0)),
            lambda: client.claim(digest),
            lambda: client.put_claim(body),
            lambda: client.lease("learner", Version(0)),
        ]
        own_minio.kill()
        refused = httpx.get(f"{store.url}/v1/objects/{'0' * 64}", timeout=LIMIT_S)
        assert (refused.status_code, refused.json()["code"], refused.json()["retryable"]) == (
            503, "storage_unavailable", True,
        )  # fmt: skip
        threads = [threading.Thread(target=call) for call in calls]
        for thread in threads:
            thread.start()
        eventually(lambda: store.metric("storage_failures_total") >= failures + 8)
        own_minio.start()
        for thread in threads:
            thread.join(LIMIT_S)
            assert not thread.is_alive()
        assert plain(fetched(client, 1)) == plain(some(1))
        assert client.claim(digest) == body
        client.lease("learner", Version(1))
        eventually(lambda: client.versions() == [1])  # sweeping continues after the outage


def test_a_read_continues_after_a_pause_of_minio(serve: Callable[..., Store], own_minio: Minio) -> None:
    store, requested = serve(minio=own_minio), threading.Event()
    with SnapshotClient(store.url) as client:
        put(client, 0, some(0))
        manifest = client.manifest(Version(0))
        client._calls._http.event_hooks = {"request": [lambda request: requested.set()]}
        own_minio.pause()
        try:
            with ThreadPoolExecutor(1) as thread:
                reading = thread.submit(lambda: list(client.tensors(manifest)))
                assert requested.wait(LIMIT_S)
                assert not wait([reading], timeout=1.0).done, "the read must wait while MinIO is paused"
                own_minio.resume()
                assert plain(reading.result(LIMIT_S)) == plain(some(0))
        finally:
            own_minio.resume()


def test_a_store_killed_in_the_middle_of_an_upload_leaves_no_parts(start_process: Callable[..., Process]) -> None:
    """The restarted store or the next upload of the same bytes removes them."""
    store = start_process()
    body = b"".join(bytes(tensor.raw.data) for tensor in some(3, parts=1, size=80 * MEBIBYTE))
    digest = blake3(body).hexdigest()
    client = s3_client(store.minio)

    def unfinished() -> int:
        return len(client._list_multipart_uploads("runs", prefix=f"{store.prefix}objects/{digest}").uploads)

    def half() -> Iterator[bytes]:
        yield body[: 70 * MEBIBYTE]
        eventually(lambda: unfinished() == 1)
        store.kill()
        yield body[70 * MEBIBYTE :]

    with pytest.raises(httpx.TransportError):
        httpx.put(f"{store.url}/v1/objects/{digest}", content=half(), timeout=LIMIT_S)
    assert store.objects() == {}
    store.start()
    store.ready()
    assert httpx.put(f"{store.url}/v1/objects/{digest}", content=body, timeout=LIMIT_S).status_code == 201
    assert unfinished() == 0


@pytest.mark.parametrize("presign", [True, False])
def test_a_truncated_object_is_reported_as_damaged(serve: Callable[..., Store], presign: bool) -> None:
    store = serve(presign=presign)
    with SnapshotClient(store.url) as client:
        manifest = put(client, 5, some(1))
        tamper(store, manifest, lambda body: body[:-1])
        with pytest.raises(Damaged, match=r"^version 5: the object \w{12} ends inside tensor part 2: it is truncated$"):
            fetched(client, 5)
        tamper(store, manifest, lambda body: body + b"x")  # right length, wrong last byte
        with pytest.raises(Damaged, match=r"^version 5, tensor part 2"):
            fetched(client, 5)


def test_an_object_deleted_from_the_bucket_is_missing_and_can_be_put_again(store: Store) -> None:
    with SnapshotClient(store.url) as client:
        manifest = put(client, 5, some(1))
        s3_client(store.minio).remove_object("runs", f"{store.prefix}objects/{manifest.object}")
        with pytest.raises(VersionMissing, match="version 5: the store no longer holds its weights"):
            fetched(client, 5)
        put(client, 5, some(1))
        assert plain(fetched(client, 5)) == plain(some(1))


def test_versions_below_every_lease_are_swept_from_the_bucket(store: Store) -> None:
    with SnapshotClient(store.url) as client:
        manifests = [put(client, version, some(version)) for version in range(4)]
        client.lease("learner", Version(2))
        eventually(lambda: store.objects().keys() == {manifests[2].object, manifests[3].object})
        assert store.objects("versions/").keys() == {"00000002.json", "00000003.json"}
        assert client.versions() == [2, 3]


def test_claims_are_stored_in_the_bucket_and_expire(serve: Callable[..., Store]) -> None:
    store, body = serve(), os.urandom(3 * MEBIBYTE)
    with SnapshotClient(store.url) as client:
        digest = client.put_claim(body)
        assert digest == blake3(body).hexdigest()
        assert client.claim(digest) == body
        assert store.objects("claims/") == {digest: len(body)}
    impatient = serve(prefix=store.prefix, claims_keep_s=0.1)
    with SnapshotClient(impatient.url) as client:
        eventually(lambda: store.objects("claims/") == {})
        with pytest.raises(ClaimMissing, match=digest):
            client.claim(digest)


def test_a_claim_changed_in_the_bucket_is_reported_as_damaged(store: Store) -> None:
    with SnapshotClient(store.url) as client:
        digest = client.put_claim(b"a record's body")
        s3_client(store.minio)._put_object("runs", f"{store.prefix}claims/{digest}", b"another's body")
        with pytest.raises(Damaged, match=f"^body {digest[:12]}: the digest of its 14 bytes is different$"):
            client.claim(digest)


def test_an_expired_address_is_requested_again(serve: Callable[..., Store]) -> None:
    """The reader takes longer than the address is valid, and then its connection breaks."""
    store, tensors = serve(presigned_s=10), some(1, parts=24, size=4 * MEBIBYTE)
    store.storage._config = store.storage._config.model_copy(update={"presigned_s": 2})
    sent = store.metric("sent_bytes_total")
    with SnapshotClient(store.url) as client:
        put(client, 0, tensors)
        manifest = client.manifest(Version(0))
        reading = client.tensors(manifest)
        had = [next(reading)]
        later = httpx.get(f"{store.url}/v1/objects/{manifest.object}").headers["Location"]
        eventually(lambda: httpx.get(later, headers={"Range": "bytes=0-0"}).status_code == 403)
        redirected = store.metric("redirected_reads_total")
        breaking = client._calls._direct._transport._pool  # type: ignore[attr-defined]
        for connection in breaking.connections:
            connection._connection._network_stream._sock.shutdown(2)
        had.extend(reading)
        assert plain(had) == plain(tensors)
    assert store.metric("redirected_reads_total") > redirected
    assert store.metric("sent_bytes_total") == sent


def test_the_store_works_over_tls_with_a_private_ca(serve: Callable[..., Store], tmp_path: Path) -> None:
    with Minio(tmp_path / "tls", tls=True) as minio:
        store = serve(ca_file=minio.ca_file, minio=minio)
        sent = store.metric("sent_bytes_total")
        with SnapshotClient(store.url, ca_file=minio.ca_file) as client:
            put(client, 0, some(0, parts=3, size=13 * MEBIBYTE))
            assert plain(fetched(client, 0)) == plain(some(0, parts=3, size=13 * MEBIBYTE))
            assert client.claim(client.put_claim(b"body")) == b"body"
        assert store.metric("sent_bytes_total") == sent
