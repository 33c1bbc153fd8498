"""The snapshot store over a folder, served in this process, with the client of the learner and the workers."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from palimpsest.common.snapshots import frames
from palimpsest.common.snapshots.client import SnapshotClient, StoreUnavailable, VersionConflict, VersionMissing
from palimpsest.common.snapshots.manifest import Damaged
from palimpsest.common.versions import Version
from tests.servers.stored_weights import CANARIES, a_tensor, fetched, flip, plain, put, some_tensors
from tests.servers.stores import FolderStore, eventually, written_store
from tools.backends.ports import free

pytestmark = pytest.mark.servers


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FolderStore]:
    with written_store(tmp_path / "snapshots") as served:
        yield served


@pytest.fixture
def client(store: FolderStore) -> Iterator[SnapshotClient]:
    with SnapshotClient(store.url) as opened:
        yield opened


def test_every_tensor_is_read_bit_for_bit(client: SnapshotClient) -> None:
    tensors = some_tensors(seed=1)
    manifest = put(client, 0, tensors)
    assert plain(fetched(client, 0)) == plain(tensors)
    assert client.manifest(Version(0)) == manifest
    assert (manifest.run, manifest.version, manifest.canaries) == ("t", 0, CANARIES)


def test_the_same_weights_under_two_numbers_are_stored_once(store: FolderStore, client: SnapshotClient) -> None:
    first, second = put(client, 0, some_tensors(seed=1)), put(client, 1, some_tensors(seed=1))
    assert first.digest == second.digest
    assert store.objects() == {first.object: first.object_size}
    assert client.versions() == [0, 1]


def test_putting_a_version_again_does_nothing(store: FolderStore, client: SnapshotClient) -> None:
    assert put(client, 3, some_tensors(seed=1)) == put(client, 3, some_tensors(seed=1))
    assert client.versions() == [3]
    assert len(store.objects()) == 1


def test_different_weights_for_an_existing_version_are_a_conflict(client: SnapshotClient) -> None:
    put(client, 3, some_tensors(seed=1))
    with pytest.raises(VersionConflict, match="version 3 already exists with digest"):
        put(client, 3, some_tensors(seed=2))
    assert plain(fetched(client, 3)) == plain(some_tensors(seed=1))


def test_the_manifest_of_an_unknown_version_raises_version_missing(client: SnapshotClient) -> None:
    with pytest.raises(VersionMissing, match="version 8 is not in the store"):
        client.manifest(Version(8))


def test_versions_below_every_lease_are_swept_and_the_others_stay(store: FolderStore, client: SnapshotClient) -> None:
    manifests = [put(client, version, some_tensors(seed=version)) for version in range(4)]
    client.lease("replica", Version(2))  # first: a sweep may run between the two leases
    client.lease("learner", Version(3))
    eventually(lambda: client.versions() == [2, 3] and len(store.objects()) == 2)
    with pytest.raises(VersionMissing):
        client.manifest(Version(0))
    with pytest.raises(VersionMissing, match="version 1: the store no longer holds its weights"):
        list(client.tensors(manifests[1]))
    assert plain(fetched(client, 2)) == plain(some_tensors(seed=2))


def test_fetching_deleted_weights_raises_version_missing(store: FolderStore, client: SnapshotClient) -> None:
    manifest = put(client, 0, some_tensors(seed=1))
    (store.folder / "objects" / manifest.object).unlink()
    with pytest.raises(VersionMissing, match="version 0: the store no longer holds its weights"):
        list(client.tensors(manifest))


def test_putting_a_version_again_restores_deleted_weights(store: FolderStore, client: SnapshotClient) -> None:
    manifest = put(client, 0, some_tensors(seed=1))
    (store.folder / "objects" / manifest.object).unlink()
    put(client, 0, some_tensors(seed=1))
    assert plain(fetched(client, 0)) == plain(some_tensors(seed=1))


@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
def test_the_error_for_a_truncated_object_names_the_version(
    store: FolderStore, client: SnapshotClient, share: float
) -> None:
    manifest = put(client, 5, some_tensors(seed=1))
    os.truncate(store.folder / "objects" / manifest.object, int(share * manifest.object_size))
    with pytest.raises(Damaged, match=r"^version 5: the object \w{12} ends inside tensor .*: it is truncated$"):
        fetched(client, 5)


def test_the_error_for_a_flipped_byte_names_the_tensor(store: FolderStore, client: SnapshotClient) -> None:
    manifest = put(client, 5, some_tensors(seed=1))
    path = store.folder / "objects" / manifest.object
    for entry in manifest.tensors:
        if entry.name in ("empty", "zeros"):  # the object holds no values of these tensors
            continue
        flip(path, entry.start + entry.length - 1)
        with pytest.raises(Damaged, match=f"^version 5, tensor {entry.name}: "):
            fetched(client, 5)
        flip(path, entry.start + entry.length - 1)
    assert plain(fetched(client, 5)) == plain(some_tensors(seed=1))


def test_no_flipped_byte_changes_the_weights_undetected(store: FolderStore, client: SnapshotClient) -> None:
    """Every flipped byte is detected, except for a few unused bits of zstd."""
    tensors = [a_tensor("w", "float32", (2, 3), seed=1), a_tensor("scalar", "bfloat16", (), seed=2)]
    manifest = put(client, 5, tensors)
    path, noticed = store.folder / "objects" / manifest.object, 0
    for place in range(manifest.object_size):
        flip(path, place)
        try:
            assert plain(fetched(client, 5)) == plain(tensors)
        except Damaged:
            noticed += 1
        flip(path, place)
    assert noticed >= manifest.object_size - 4


def test_only_tensors_before_the_damage_are_returned(store: FolderStore, client: SnapshotClient) -> None:
    manifest = put(client, 5, some_tensors(seed=1))
    third = manifest.tensors[2]
    flip(store.folder / "objects" / manifest.object, third.start + third.length // 2)
    had = []
    with pytest.raises(Damaged, match=f"tensor {third.name}"):
        had.extend(client.tensors(manifest))
    assert plain(had) == plain(some_tensors(seed=1)[:2])


def test_without_the_digest_check_damaged_weights_are_returned(
    store: FolderStore, client: SnapshotClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = [a_tensor("w", "uint8", (4096,), seed=1)]
    manifest = put(client, 5, tensors)
    flip(store.folder / "objects" / manifest.object, 2000)
    monkeypatch.setattr(frames, "verify", lambda *_: None)  # of each tensor
    monkeypatch.setattr(frames.Hashed, "verify", lambda *_: None)  # of the object
    assert plain(fetched(client, 5)) != plain(tensors)


def test_the_error_for_an_unreachable_store_names_its_address() -> None:
    pauses: list[float] = []
    url = f"http://127.0.0.1:{free()}"
    expected = f"the snapshot store at {url} did not answer in 120 s: ConnectError"
    with SnapshotClient(url, sleep=pauses.append) as client, pytest.raises(StoreUnavailable, match=expected):
        client.versions()
    assert pauses == [0.2, 0.4, 0.8, 1.6, 3.2, *[5.0] * 22]


def test_the_patience_for_a_store_can_be_set() -> None:
    pauses: list[float] = []
    url = f"http://127.0.0.1:{free()}"
    with (
        SnapshotClient(url, patience_s=3.5, sleep=pauses.append) as client,
        pytest.raises(StoreUnavailable, match=r"did not answer in 3\.5 s"),
    ):
        client.versions()
    assert pauses == [0.2, 0.4, 0.8, 1.6]
