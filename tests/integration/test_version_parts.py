"""Versions that several ranks store: the digest of a single upload, and nothing served of half a version."""

import asyncio
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
from msgspec.structs import replace

from palimpsest.common.outages import Outages
from palimpsest.common.service import Server
from palimpsest.common.snapshots import frames
from palimpsest.common.snapshots.client import SnapshotClient, VersionConflict, VersionMissing
from palimpsest.common.snapshots.fencing import Fenced
from palimpsest.common.snapshots.manifest import PARTS_SCHEMA, Damaged, seal
from palimpsest.common.snapshots.raw_file import RawFile
from palimpsest.common.snapshots.walker import Walker
from palimpsest.common.snapshots.writer import Writer
from palimpsest.common.versions import Version
from palimpsest.services.audit.read_store import read_versions
from palimpsest.services.learner.sharding.part_messages import MessageOrders, PartMessages, PartServer
from palimpsest.services.learner.sharding.published_weights import ShardedWeights, StoredParent
from palimpsest.services.learner.sharding.version_part import VersionPart
from palimpsest.services.snapshot_store.app import create_app
from palimpsest.services.snapshot_store.storage_disk import DiskStorage
from tests.learner_parts.rank_threads import ShardedStore
from tests.servers.stored_weights import CANARIES, RawTensor, a_tensor, fetched, flip, plain, put, some_tensors
from tests.servers.stores import FolderStore, eventually, written_store

pytestmark = pytest.mark.servers


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FolderStore]:
    with written_store(tmp_path / "snapshots") as served:
        yield served


@pytest.fixture
def client(store: FolderStore) -> Iterator[SnapshotClient]:
    with SnapshotClient(store.url) as opened:
        yield opened


def moved(tensors: list[RawTensor], seed: int) -> list[RawTensor]:
    """The weights after a small step: every eighth number changes by one."""
    numbers, after = np.random.default_rng(seed), []
    for tensor in tensors:
        raw = tensor.raw.copy()
        if len(raw) >= 16:
            raw[numbers.integers(0, 8) :: 16] += 1
        after.append(replace_raw(tensor, raw))
    return after


def replace_raw(tensor: RawTensor, raw: np.ndarray) -> RawTensor:
    return RawTensor(tensor.name, tensor.dtype, tensor.shape, raw)


@pytest.mark.parametrize("ranks", [1, 2, 3, 12])
def test_a_version_of_several_ranks_has_the_digest_and_the_bytes_of_a_single_upload(
    client: SnapshotClient, ranks: int
) -> None:
    weights = some_tensors(seed=1)
    alone = put(client, 0, weights)
    together = ShardedStore(client, weights, ranks=ranks)
    first = together.put(1, weights, CANARIES)
    assert first.digest == alone.digest
    assert first.canaries == CANARIES
    assert client.manifest(Version(1)) == first
    assert plain(fetched(client, 1)) == plain(weights)
    assert len(first.objects) == min(ranks, 6)  # seven tensors, of which one has no byte
    assert first.schema == (PARTS_SCHEMA if ranks > 1 else 2)
    second = together.put(2, moved(weights, 2))
    assert second.parent is not None
    assert second.digest == put(client, 3, moved(weights, 2)).digest


def test_readers_walk_over_parts_forwards_and_back(client: SnapshotClient, tmp_path: Path) -> None:
    weights = [some_tensors(seed=1)]
    together = ShardedStore(client, weights[0])
    for version in range(4):
        together.put(version, weights[version])
        weights.append(moved(weights[version], version))
    raw = RawFile(tmp_path / "raw")
    walker = Walker(client, raw)
    for version in (2, 3, 0, 1):
        walker.move(Version(version))
        manifest = client.manifest(Version(version))
        assert plain(list(raw.tensors(manifest))) == plain(weights[version])


def test_each_rank_holds_its_part_and_that_of_the_parent(client: SnapshotClient) -> None:
    weights = [a_tensor(f"w{i}", "bfloat16", (64, 32 + i), seed=i) for i in range(6)]
    total, largest = sum(len(each.raw) for each in weights), max(len(each.raw) for each in weights)
    together = ShardedStore(client, weights, ranks=3)
    parts = together.ranks.parts
    sizes = [sum(len(each.raw) for each in weights if each.name in part.tensors) for part in parts]
    assert sum(sizes) == total
    assert max(sizes) <= total / 3 + largest
    assert [part.held_bytes for part in parts] == [0, 0, 0]
    together.put(0, weights)
    assert [part.held_bytes for part in parts] == sizes
    peaks = []
    encode = VersionPart.encode

    def noted(self: VersionPart, *, delta: bool) -> object:
        peaks.append((parts.index(self), self.held_bytes))
        return encode(self, delta=delta)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VersionPart, "encode", noted)
        together.put(1, moved(weights, 1))
    assert sorted(peaks) == [(rank, 2 * size) for rank, size in enumerate(sizes)]
    assert [part.held_bytes for part in parts] == sizes
    assert [part._file for part in parts] == [None] * 3


def test_a_rank_that_fails_after_its_upload_leaves_no_version(tmp_path: Path) -> None:
    weights, send = some_tensors(seed=1), VersionPart.send
    with FolderStore(tmp_path, sweep_s=0.05) as store, SnapshotClient(store.url) as client:
        Writer(client).begin()
        together = ShardedStore(client, weights)
        together.put(0, weights)
        before = store.objects()

        def sent(self: VersionPart, *, again: bool = False) -> int:
            left = send(self, again=again)
            if self is together.ranks.parts[1]:
                raise ConnectionError("the rank died")
            return left

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(VersionPart, "send", sent)
            with pytest.raises(ConnectionError, match="the rank died"):
                together.put(1, moved(weights, 1))
        assert client.versions() == [0]
        with pytest.raises(VersionMissing):
            client.manifest(Version(1))
        assert set(before) < set(store.objects()), "the parts are there, without a manifest"
    with FolderStore(tmp_path, sweep_s=0.05) as store, SnapshotClient(store.url) as client:
        eventually(lambda: store.objects() == before)  # a store forgets the uploads when it starts again
        Writer(client).begin()
        later = ShardedStore(client, weights)
        assert later.put(1, moved(weights, 1), writer=2).parent is None
        assert plain(fetched(client, 1)) == plain(moved(weights, 1))


def test_a_replaced_learner_stores_no_version(store: FolderStore, client: SnapshotClient) -> None:
    weights = some_tensors(seed=1)
    together = ShardedStore(client, weights)
    Writer(client).begin()
    with pytest.raises(Fenced):
        together.put(0, weights, writer=1)
    assert client.versions() == []
    eventually(lambda: store.objects() == {})


def test_other_weights_under_a_stored_number_are_a_conflict(client: SnapshotClient) -> None:
    weights = some_tensors(seed=1)
    put(client, 0, weights)
    with pytest.raises(VersionConflict):
        ShardedStore(client, weights).put(0, moved(weights, 1))


@pytest.mark.parametrize("number", [0, 1])
def test_a_flipped_bit_in_any_part_is_refused(store: FolderStore, client: SnapshotClient, number: int) -> None:
    weights = [a_tensor(name, "uint8", (4096,), seed=seed) for seed, name in enumerate("ab")]
    manifest = ShardedStore(client, weights).put(5, weights)
    part = manifest.objects[number]
    flip(store.folder / "objects" / part.digest, part.size // 2)
    with (
        pytest.raises(Damaged, match=f"version 5: the bytes of its object {part.digest[:12]} have the digest"),
        client.object(manifest),
    ):
        pass
    with pytest.raises(Damaged, match=f"^version 5, tensor {'ab'[number]}: "):
        fetched(client, 5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frames, "verify", lambda *_: None)  # of each tensor
        with pytest.raises(Damaged, match=part.digest[:12]):
            fetched(client, 5)
        patch.setattr(frames.Hashed, "verify", lambda *_: None)  # of the parts
        assert plain(fetched(client, 5)) != plain(weights)


@pytest.mark.parametrize("number", [0, 1])
def test_the_audit_finds_a_fault_in_any_part(store: FolderStore, client: SnapshotClient, number: int) -> None:
    weights = [a_tensor(name, "uint8", (4096,), seed=seed) for seed, name in enumerate("ab")]
    part = ShardedStore(client, weights).put(0, weights).objects[number]

    def fault() -> str:
        (found,) = asyncio.run(read_versions(DiskStorage(store.folder, tidy=False), quick=False)).stored
        return found.trouble

    assert fault() == ""
    flip(store.folder / "objects" / part.digest, part.size // 2)
    assert f"the bytes of its object {part.digest[:12]} have the digest" in fault()
    (store.folder / "objects" / part.digest).unlink()
    assert fault() == f"its object {part.digest[:12]} is not in the store"


def test_swapped_and_truncated_parts_are_refused(store: FolderStore, client: SnapshotClient) -> None:
    weights = [a_tensor(name, "uint8", (4096,), seed=seed) for seed, name in enumerate("ab")]
    manifest = ShardedStore(client, weights).put(5, weights)
    first, second = (store.folder / "objects" / part.digest for part in manifest.objects)
    assert first.stat().st_size == second.stat().st_size
    bodies = first.read_bytes(), second.read_bytes()
    first.write_bytes(bodies[1])
    second.write_bytes(bodies[0])
    with pytest.raises(Damaged), client.object(manifest):
        pass
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frames.Hashed, "verify", lambda *_: None)
        with pytest.raises(Damaged, match="version 5, tensor a"):
            fetched(client, 5)
    first.write_bytes(bodies[0][:-1])
    second.write_bytes(bodies[1])
    message = f"the object {first.name[:12]} has {len(bodies[0]) - 1} bytes, not {len(bodies[0])}"
    with pytest.raises(Damaged, match=message), client.object(manifest):
        pass


def test_a_manifest_with_its_parts_in_another_order_is_refused(client: SnapshotClient) -> None:
    weights = some_tensors(seed=1)
    manifest = ShardedStore(client, weights).put(5, weights)
    swapped = replace(manifest, version=Version(6), parts=manifest.objects[::-1])
    reply = client._calls.call(lambda http: http.put("/v1/versions/6", content=seal(swapped)))
    assert reply.status_code == 422
    assert "its object is different from the digest of its parts" in reply.json()["message"]


def test_a_lost_part_is_sent_again(store: FolderStore, client: SnapshotClient) -> None:
    weights = some_tensors(seed=1)
    together = ShardedStore(client, weights)
    put_manifest, lost = client.put_manifest, []

    def put_later(manifest: object) -> None:
        if not lost:
            lost.append(max(store.folder.glob("objects/*"), key=lambda path: path.stat().st_size))
            lost[0].unlink()
        put_manifest(manifest)  # type: ignore[arg-type]

    client.put_manifest = put_later  # type: ignore[method-assign]
    together.put(0, weights)
    assert together.ranks.calls == ["encode", "send", "send", "keep"]
    assert plain(fetched(client, 0)) == plain(weights)


def test_a_delta_to_a_version_that_the_store_lost_is_stored_in_full(store: FolderStore, client: SnapshotClient) -> None:
    weights = some_tensors(seed=1)
    together = ShardedStore(client, weights)
    together.put(0, weights)
    together.weights._parent = replace_parent(together.weights)
    manifest = together.put(1, moved(weights, 1))
    assert manifest.parent is None
    assert plain(fetched(client, 1)) == plain(moved(weights, 1))


def replace_parent(weights: ShardedWeights) -> StoredParent:
    """The parent with another digest."""
    assert weights._parent is not None
    return dataclasses.replace(weights._parent, parent=replace(weights._parent.parent, digest="0" * 64))


def test_threads_that_exchange_messages_store_the_same_version(client: SnapshotClient) -> None:
    first, between = some_tensors(seed=1), dist.HashStore()  # type: ignore[attr-defined]
    weights, together = first, ShardedStore(client, first)
    messages = [PartMessages(between, rank=rank, size=2) for rank in range(2)]
    server = PartServer(messages[1], together.ranks.parts[1])
    together.weights._parts = MessageOrders(messages[0], together.ranks.parts[0])
    for version in range(3):
        server.finish()
        server.begin()
        manifest = together.put(version, weights)
        assert len(manifest.objects) == 2
        assert manifest.parent is None or version > 0
        assert manifest.digest == put(client, 10 + version, weights).digest
        assert plain(fetched(client, 0)) == plain(first)
        weights = moved(weights, version)
    server.finish()


def test_ranks_wait_for_room_together(tmp_path: Path) -> None:
    weights = [a_tensor(name, "uint8", (50_000,), seed=seed) for seed, name in enumerate("ab")]
    app = create_app(DiskStorage(tmp_path), sweep_s=3600, max_bytes=160_000)
    with (
        Server(app, "127.0.0.1", 0, key="snapshot_store") as server,
        SnapshotClient(f"http://127.0.0.1:{server.port}") as client,
    ):
        Writer(client).begin()
        put(client, 0, weights)
        put(client, 1, weights)  # the same object
        client.lease("learner", Version(0))
        outages, pauses = Outages(), []

        def pause(_seconds: float) -> None:
            pauses.append(outages.ongoing()[0]["problem"])
            with SnapshotClient(client.url) as person:
                put(person, 2, [a_tensor("c", "uint8", (1,), seed=3)])
                person.lease("learner", Version(2))

        with SnapshotClient(client.url, sleep_without_room=pause) as waiting:
            waiting._calls._outages = outages
            together = ShardedStore(waiting, weights)
            used = together.put(3, moved(weights, 1))
        assert "bytes are in use" in pauses[0]
        assert together.ranks.calls == ["encode", "send", "send", "keep"]
        assert sorted(client.versions()) == [2, 3]
        reply = client.request("GET", "/v1/quota")
        held = {each.digest: each.size for version in (2, 3) for each in client.manifest(Version(version)).objects}
        assert reply["used_bytes"] == sum(held.values())
        assert len(used.objects) == 2
