"""The snapshot store as a process of its own over a real MinIO, through outages, damage and sweeps."""

import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from blake3 import blake3

from common.snapshots.client import ClaimMissing, RawTensor, SnapshotClient, VersionMissing
from common.snapshots.manifest import Canary, Damaged, Manifest
from common.snapshots.writer import Writer
from common.versions import Version
from tests.backends import s3_client
from tests.stores import LIMIT_S, StoreProcess, eventually
from tools.backends.minio import Minio

pytestmark = pytest.mark.servers

MEBIBYTE = 1 << 20
CANARIES = (Canary((1, 2, 3), (1, 2), (-0.5, -1.25), ()),)
RUN = """
run.id = "t"
run.folder = "{folder}"
model.path = "none"
tasks.environments = {{ lookup = 1.0 }}
learner.versions = 1
snapshot_store.sweep_s = 0.05
snapshot_store.storage = "s3"
snapshot_store.endpoint = "{endpoint}"
snapshot_store.prefix = "{prefix}"
snapshot_store.bucket = "runs"
snapshot_store.create_bucket = true
"""


class Store(StoreProcess):
    """Over one prefix of the bucket."""

    def __init__(self, home: Path, minio: Minio, *more: str) -> None:
        self.minio, self.prefix = minio, f"{uuid.uuid4().hex}/"
        run = home / "run.toml"
        run.write_text(RUN.format(folder=home / "runs", endpoint=minio.endpoint, prefix=self.prefix))
        credentials = {"MINIO_ACCESS_KEY": minio.access_key, "MINIO_SECRET_KEY": minio.secret_key}
        super().__init__(run, *more, environment=credentials)

    def objects(self, under: str = "objects/") -> dict[str, int]:
        """What the bucket holds for this store, with its size."""
        start = self.prefix + under
        listed = s3_client(self.minio).list_objects("runs", start, recursive=True)
        return {(entry.object_name or "")[len(start) :]: entry.size or 0 for entry in listed}


@pytest.fixture
def run_store(tmp_path: Path, minio_server: Minio) -> Iterator[Callable[..., Store]]:
    """Starts stores."""
    made: list[Store] = []

    def start(*more: str, minio: Minio = minio_server) -> Store:
        made.append(Store(tmp_path, minio, *more))
        made[-1].start()
        made[-1].ready()
        return made[-1]

    yield start
    for store in made:
        store.kill()


@pytest.fixture
def store(run_store: Callable[..., Store]) -> Store:
    return run_store()


@pytest.fixture
def own_minio(tmp_path: Path) -> Iterator[Minio]:
    """One that a test may kill."""
    with Minio(tmp_path / "minio") as minio:
        yield minio


def some(seed: int, *, parts: int = 3, size: int = 1000) -> list[RawTensor]:
    """Tensors that no compression makes smaller."""
    numbers = np.random.default_rng(seed)
    return [
        RawTensor(f"part {i}", "uint8", (size,), numbers.integers(0, 256, size, dtype=np.uint8)) for i in range(parts)
    ]


def plain(tensors: list[RawTensor]) -> list[tuple[str, bytes]]:
    return [(tensor.name, tensor.raw.tobytes()) for tensor in tensors]


def put(client: SnapshotClient, version: int, tensors: list[RawTensor]) -> Manifest:
    return client.put("t", Version(version), iter(tensors), CANARIES, writer=a_writer(client))


def a_writer(client: SnapshotClient) -> int:
    """The epoch of one that may write from now on."""
    writer = Writer(client, "tests")
    writer.begin()
    return writer.epoch


def fetched(client: SnapshotClient, version: int) -> list[RawTensor]:
    return list(client.tensors(client.manifest(Version(version))))


@pytest.mark.parametrize("presign", [True, False])
def test_versions_come_back_bit_for_bit_from_the_next_process_too(
    run_store: Callable[..., Store], presign: bool
) -> None:
    store = run_store(f"--snapshot_store.presign={str(presign).lower()}")
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


def test_a_minio_killed_in_the_middle_of_an_upload_costs_only_time(
    run_store: Callable[..., Store], own_minio: Minio
) -> None:
    store, tensors, seen = run_store(minio=own_minio), some(1, parts=5, size=16 * MEBIBYTE), []
    killed, again = threading.Event(), threading.Event()

    def fail_once() -> None:
        """As soon as parts have arrived, and for two seconds."""
        parts = own_minio.folder / "data" / ".minio.sys" / "multipart"
        eventually(lambda: any(path.is_file() and path.name.startswith("part.") for path in parts.rglob("*")))
        own_minio.kill()
        killed.set()
        time.sleep(2.0)
        own_minio.start()
        seen.append((store.objects(), store.objects("versions/")))
        again.set()

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


def test_an_outage_during_everything_else_costs_only_time(run_store: Callable[..., Store], own_minio: Minio) -> None:
    store = run_store(minio=own_minio)
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
        refused = httpx.get(f"{store.url}/v1/objects/{'0' * 64}")
        assert (refused.status_code, refused.json()["code"], refused.json()["retryable"]) == (
            503, "storage_unavailable", True,
        )  # fmt: skip
        threads = [threading.Thread(target=call) for call in calls]
        for thread in threads:
            thread.start()
        eventually(lambda: store.metric("storage_failures_total") >= 8)
        own_minio.start()
        for thread in threads:
            thread.join(LIMIT_S)
            assert not thread.is_alive()
        assert plain(fetched(client, 1)) == plain(some(1))
        assert client.claim(digest) == body
        client.lease("learner", Version(1))
        eventually(lambda: client.versions() == [1])  # sweeping outlived the outage


def test_a_silent_minio_costs_only_time(run_store: Callable[..., Store], own_minio: Minio) -> None:
    store = run_store(minio=own_minio)
    with SnapshotClient(store.url) as client:
        put(client, 0, some(0))
        own_minio.pause()
        timer = threading.Timer(5.0, own_minio.resume)
        timer.start()
        assert plain(fetched(client, 0)) == plain(some(0))
        timer.join()


def test_a_store_killed_in_the_middle_of_an_upload_leaves_no_parts(store: Store) -> None:
    """The one that starts removes them, or the next upload of the same bytes does."""
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


def tamper(store: Store, manifest: Manifest, change: Callable[[bytes], bytes]) -> None:
    """Change an object behind the store's back."""
    client, name = s3_client(store.minio), f"{store.prefix}objects/{manifest.object}"
    body = change(client.get_object("runs", name).data)
    client._put_object("runs", name, body)


@pytest.mark.parametrize("presign", ["true", "false"])
def test_a_truncated_object_is_damage(run_store: Callable[..., Store], presign: str) -> None:
    store = run_store(f"--snapshot_store.presign={presign}")
    with SnapshotClient(store.url) as client:
        manifest = put(client, 5, some(1))
        tamper(store, manifest, lambda body: body[:-1])
        with pytest.raises(Damaged, match=r"^version 5: the object \w{12} ends inside tensor part 2: it is truncated$"):
            fetched(client, 5)
        tamper(store, manifest, lambda body: body + b"x")  # the byte that was lost was another
        with pytest.raises(Damaged, match=r"^version 5, tensor part 2"):
            fetched(client, 5)


def test_an_object_removed_behind_the_stores_back_is_missing_and_can_be_put_again(store: Store) -> None:
    with SnapshotClient(store.url) as client:
        manifest = put(client, 5, some(1))
        s3_client(store.minio).remove_object("runs", f"{store.prefix}objects/{manifest.object}")
        with pytest.raises(VersionMissing, match="version 5: its weights are no longer in the store"):
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


def test_claims_pass_through_the_bucket_and_end_with_their_time(run_store: Callable[..., Store]) -> None:
    store = run_store("--bus.retention_hours=0.0001", "--snapshot_store.claims_keep_hours=0.0006")
    body = os.urandom(3 * MEBIBYTE)
    with SnapshotClient(store.url) as client:
        digest = client.put_claim(body)
        assert digest == blake3(body).hexdigest()
        assert client.claim(digest) == body
        assert store.objects("claims/") == {digest: len(body)}
        eventually(lambda: store.objects("claims/") == {})
        with pytest.raises(ClaimMissing, match=digest):
            client.claim(digest)


def test_a_claim_that_was_changed_in_the_bucket_is_damage(store: Store) -> None:
    with SnapshotClient(store.url) as client:
        digest = client.put_claim(b"a record's body")
        s3_client(store.minio)._put_object("runs", f"{store.prefix}claims/{digest}", b"another's body")
        with pytest.raises(Damaged, match=f"^the body {digest[:12]}: its 14 bytes contradict its digest$"):
            client.claim(digest)


def test_an_address_that_expired_is_asked_for_again(
    run_store: Callable[..., Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reader takes longer than an address holds, and its connection breaks after that."""
    store, tensors = run_store("--snapshot_store.presigned_s=10"), some(1, parts=24, size=4 * MEBIBYTE)
    with SnapshotClient(store.url) as client:
        put(client, 0, tensors)
        reading = client.tensors(client.manifest(Version(0)))
        had = [next(reading)]
        time.sleep(11.0)
        breaking = client._calls._direct._transport._pool  # type: ignore[attr-defined]
        for connection in breaking.connections:
            connection._connection._network_stream._sock.shutdown(2)
        had.extend(reading)
        assert plain(had) == plain(tensors)
    assert store.metric("redirected_reads_total") == 2
    assert store.metric("sent_bytes_total") == 0


def test_everything_works_over_tls_with_a_ca_of_ones_own(run_store: Callable[..., Store], tmp_path: Path) -> None:
    with Minio(tmp_path / "tls", tls=True) as minio:
        store = run_store(f"--snapshot_store.ca_file={minio.ca_file}", minio=minio)
        with SnapshotClient(store.url, ca_file=minio.ca_file) as client:
            put(client, 0, some(0, parts=3, size=13 * MEBIBYTE))
            assert plain(fetched(client, 0)) == plain(some(0, parts=3, size=13 * MEBIBYTE))
            assert client.claim(client.put_claim(b"body")) == b"body"
        assert store.metric("sent_bytes_total") == 0
