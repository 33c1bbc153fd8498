"""The snapshot store as a process of its own, used by the client that learner and workers use."""

import os
import resource
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import numpy as np
import pytest
from blake3 import blake3

from common.snapshots import client as client_module
from common.snapshots.client import RawTensor, SnapshotClient, StoreUnavailable, VersionConflict, VersionMissing
from common.snapshots.manifest import Canary, Damaged, Manifest
from common.snapshots.writer import Writer
from common.versions import Version
from tests.stores import LIMIT_S, StoreProcess, eventually
from tools.backends.ports import free

pytestmark = pytest.mark.servers

RUN = """
run.id = "t"
run.folder = "{folder}"
model.path = "none"
tasks.environments = {{ lookup = 1.0 }}
learner.versions = 1
snapshot_store.sweep_s = 0.05
"""
CANARIES = (Canary((1, 2, 3), (1, 2), (-0.5, -1.25), ()),)
ITEMSIZES = {"bfloat16": 2, "float32": 4, "int64": 8, "uint8": 1, "bool": 1}
MEBIBYTE = 1 << 20


def a_tensor(name: str, dtype: str, shape: tuple[int, ...], seed: int) -> RawTensor:
    """Any bits at all: not-a-numbers, infinities, denormals."""
    size = ITEMSIZES[dtype] * int(np.prod(shape))
    return RawTensor(name, dtype, shape, np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8))


def some_tensors(seed: int) -> list[RawTensor]:
    return [
        a_tensor("layers.0.weight", "bfloat16", (17, 33), seed),
        a_tensor("norm", "float32", (64,), seed + 1),
        a_tensor("positions", "int64", (5, 1, 3), seed + 2),
        a_tensor("empty", "bfloat16", (0, 8), seed + 3),
        a_tensor("scalar", "float32", (), seed + 4),
        a_tensor("mask", "bool", (9,), seed + 5),
        RawTensor("zeros", "bfloat16", (1000, 100), np.zeros(200_000, dtype=np.uint8)),
    ]


def large(seed: int) -> list[RawTensor]:
    """24 MiB that no compression makes smaller, in three tensors."""
    return [a_tensor(f"part {i}", "uint8", (8 * MEBIBYTE,), 10 * seed + i) for i in range(3)]


def plain(tensors: list[RawTensor]) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {t.name: (t.dtype, t.shape, t.raw.tobytes()) for t in tensors}


class Store(StoreProcess):
    """Over one folder."""

    def __init__(self, home: Path) -> None:
        self.folder = home / "runs" / "t" / "snapshots"
        run = home / "run.toml"
        run.write_text(RUN.format(folder=home / "runs"))
        super().__init__(run)

    def objects(self) -> dict[str, int]:
        """Every file below objects/, hidden ones too, with its size."""
        return {path.name: path.stat().st_size for path in self.folder.glob("objects/*")}


@pytest.fixture
def idle(tmp_path: Path) -> Iterator[Store]:
    """A store that has not been started."""
    made = Store(tmp_path)
    yield made
    made.kill()


@pytest.fixture
def store(idle: Store) -> Store:
    """A store that answers."""
    idle.start()
    idle.ready()
    with SnapshotClient(idle.url) as first:
        Writer(first).begin()
    return idle


@pytest.fixture
def client(store: Store) -> Iterator[SnapshotClient]:
    with SnapshotClient(store.url) as opened:
        yield opened


def put(client: SnapshotClient, version: int, tensors: list[RawTensor]) -> Manifest:
    return client.put("t", Version(version), iter(tensors), CANARIES, writer=1)


def fetched(client: SnapshotClient, version: int) -> list[RawTensor]:
    return list(client.tensors(client.manifest(Version(version))))


class Between:
    """Passes bytes between client and store. `before` sees each piece before it goes on, and which way it goes."""

    def __init__(self, store: Store, before: Callable[[str, bytes], None]) -> None:
        self._store, self._before = store, before
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listening.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listening.accept()
                try:
                    store = socket.create_connection(("127.0.0.1", self._store.port))
                except OSError:
                    client.close()
                    continue
                for way, source, sink in (("up", client, store), ("down", store, client)):
                    threading.Thread(target=self._pass, args=(way, source, sink), daemon=True).start()

    def _pass(self, way: str, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while piece := source.recv(65536):
                self._before(way, piece)
                sink.sendall(piece)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)  # wakes the other direction
            end.close()


class Once:
    """Acts the first time that so many bytes have gone this way, or that they contain a text."""

    def __init__(self, way: str, act: Callable[[], None], *, after: int = 0, text: bytes = b"") -> None:
        self._way, self._act, self._left, self._text = way, act, after, text
        self.done = False

    def __call__(self, way: str, piece: bytes) -> None:
        if self.done or way != self._way:
            return
        self._left -= len(piece)
        if self._left <= 0 and self._text in piece:
            self.done = True
            self._act()


def through(store: Store, once: Once) -> Iterator[SnapshotClient]:
    between = Between(store, once)
    with SnapshotClient(between.url) as opened:
        yield opened
    between.close()
    assert once.done


def test_every_tensor_comes_back_bit_for_bit(client: SnapshotClient) -> None:
    tensors = some_tensors(seed=1)
    manifest = put(client, 0, tensors)
    assert plain(fetched(client, 0)) == plain(tensors)
    assert client.manifest(Version(0)) == manifest
    assert (manifest.run, manifest.version, manifest.canaries) == ("t", 0, CANARIES)


def test_a_version_is_there_for_the_next_process_of_the_store(store: Store, client: SnapshotClient) -> None:
    put(client, 0, some_tensors(seed=1))
    store.again()
    assert plain(fetched(client, 0)) == plain(some_tensors(seed=1))


def test_the_same_weights_under_two_numbers_are_stored_once(store: Store, client: SnapshotClient) -> None:
    first, second = put(client, 0, some_tensors(seed=1)), put(client, 1, some_tensors(seed=1))
    assert first.digest == second.digest
    assert store.objects() == {first.object: first.object_size}
    assert client.versions() == [0, 1]


def test_putting_a_version_again_is_harmless(store: Store, client: SnapshotClient) -> None:
    assert put(client, 3, some_tensors(seed=1)) == put(client, 3, some_tensors(seed=1))
    assert client.versions() == [3]
    assert len(store.objects()) == 1


def test_other_weights_under_a_taken_number_are_a_conflict(client: SnapshotClient) -> None:
    put(client, 3, some_tensors(seed=1))
    with pytest.raises(VersionConflict, match="version 3 already stands with digest"):
        put(client, 3, some_tensors(seed=2))
    assert plain(fetched(client, 3)) == plain(some_tensors(seed=1))


def test_a_version_that_is_not_there_is_missing(client: SnapshotClient) -> None:
    with pytest.raises(VersionMissing, match="version 8 is not in the store"):
        client.manifest(Version(8))


def test_versions_below_every_lease_are_swept_and_the_others_stay(store: Store, client: SnapshotClient) -> None:
    manifests = [put(client, version, some_tensors(seed=version)) for version in range(4)]
    client.lease("replica", Version(2))  # first: a sweep may come between the two
    client.lease("learner", Version(3))
    eventually(lambda: client.versions() == [2, 3] and len(store.objects()) == 2)
    with pytest.raises(VersionMissing):
        client.manifest(Version(0))
    with pytest.raises(VersionMissing, match="version 1: its weights are no longer in the store"):
        list(client.tensors(manifests[1]))
    assert plain(fetched(client, 2)) == plain(some_tensors(seed=2))


def test_leases_hold_after_the_store_was_killed(store: Store, client: SnapshotClient) -> None:
    for version in range(3):
        put(client, version, some_tensors(seed=version))
    client.lease("replica", Version(0))
    store.again()
    client.lease("learner", Version(2))
    assert httpx.get(f"{store.url}/v1/status").json()["leases"] == {"replica": 0, "learner": 2}
    client.lease("replica", Version(1))
    eventually(lambda: client.versions() == [1, 2])


def test_a_store_killed_in_the_middle_of_an_upload_costs_only_time(store: Store) -> None:
    once = Once("up", store.again, after=10 * MEBIBYTE)
    for client in through(store, once):
        manifest = put(client, 0, large(seed=1))
        assert store.objects() == {manifest.object: manifest.object_size}
        assert plain(fetched(client, 0)) == plain(large(seed=1))


def test_what_a_killed_store_has_of_an_upload_is_gone_when_it_starts_again(store: Store) -> None:
    body = large(seed=1)[0].raw.tobytes()
    with socket.create_connection(("127.0.0.1", store.port)) as sender:
        head = f"PUT /v1/objects/{blake3(body).hexdigest()} HTTP/1.1\r\nHost: s\r\nContent-Length: {len(body)}\r\n\r\n"
        sender.sendall(head.encode() + body[: 4 * MEBIBYTE])
        eventually(lambda: sum(store.objects().values()) > MEBIBYTE)
        store.kill()
    assert [name[-8:] for name in store.objects()] == [".partial"]
    store.start()
    store.ready()
    assert store.objects() == {}


def test_a_store_killed_in_the_middle_of_a_download_costs_only_time(store: Store) -> None:
    once = Once("down", store.again, after=10 * MEBIBYTE)
    for client in through(store, once):
        put(client, 0, large(seed=1))
        assert plain(fetched(client, 0)) == plain(large(seed=1))


def test_weights_that_vanish_before_their_manifest_comes_are_sent_again(store: Store) -> None:
    """The store dies after the upload; the one that starts knows nothing of it and sweeps."""

    def swept() -> None:
        store.again()
        eventually(lambda: store.objects() == {})

    once = Once("up", swept, text=b"PUT /v1/versions/0 ")
    for client in through(store, once):
        put(client, 0, some_tensors(seed=1))
        assert client.versions() == [0]
        assert plain(fetched(client, 0)) == plain(some_tensors(seed=1))


def test_a_version_whose_weights_vanish_between_manifest_and_fetch_is_missing(
    store: Store, client: SnapshotClient
) -> None:
    manifest = put(client, 0, some_tensors(seed=1))
    (store.folder / "objects" / manifest.object).unlink()
    with pytest.raises(VersionMissing, match="version 0: its weights are no longer in the store"):
        list(client.tensors(manifest))


def test_a_version_put_again_mends_weights_that_vanished(store: Store, client: SnapshotClient) -> None:
    manifest = put(client, 0, some_tensors(seed=1))
    (store.folder / "objects" / manifest.object).unlink()
    put(client, 0, some_tensors(seed=1))
    assert plain(fetched(client, 0)) == plain(some_tensors(seed=1))


@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
def test_a_truncated_object_is_damage_and_names_the_version(store: Store, client: SnapshotClient, share: float) -> None:
    manifest = put(client, 5, some_tensors(seed=1))
    os.truncate(store.folder / "objects" / manifest.object, int(share * manifest.object_size))
    with pytest.raises(Damaged, match=r"^version 5: the object \w{12} ends inside tensor .*: it is truncated$"):
        fetched(client, 5)


def flip(path: Path, place: int) -> None:
    body = bytearray(path.read_bytes())
    body[place] ^= 0x10
    path.write_bytes(body)


def test_a_flipped_byte_among_the_numbers_is_damage_and_names_the_tensor(store: Store, client: SnapshotClient) -> None:
    manifest = put(client, 5, some_tensors(seed=1))
    path = store.folder / "objects" / manifest.object
    for entry in manifest.tensors:
        if entry.name in ("empty", "zeros"):  # no numbers of theirs stand in the object
            continue
        flip(path, entry.start + entry.length - 1)
        with pytest.raises(Damaged, match=f"^version 5, tensor {entry.name}: "):
            fetched(client, 5)
        flip(path, entry.start + entry.length - 1)
    assert plain(fetched(client, 5)) == plain(some_tensors(seed=1))


def test_a_flipped_byte_anywhere_never_leads_to_other_weights(store: Store, client: SnapshotClient) -> None:
    """zstd has a bit or two that mean nothing; every other one is noticed."""
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


def test_tensors_before_the_damage_are_whole_and_none_after_it_is_handed_on(
    store: Store, client: SnapshotClient
) -> None:
    manifest = put(client, 5, some_tensors(seed=1))
    third = manifest.tensors[2]
    flip(store.folder / "objects" / manifest.object, third.start + third.length // 2)
    had = []
    with pytest.raises(Damaged, match=f"tensor {third.name}"):
        had.extend(client.tensors(manifest))
    assert plain(had) == plain(some_tensors(seed=1)[:2])


def test_without_the_digests_flipped_weights_would_be_handed_on(
    store: Store, client: SnapshotClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = [a_tensor("w", "uint8", (4096,), seed=1)]
    manifest = put(client, 5, tensors)
    flip(store.folder / "objects" / manifest.object, 2000)

    class Blind:
        def __init__(self, _raw: object) -> None: ...

        def hexdigest(self) -> str:
            return manifest.tensors[0].digest

    monkeypatch.setattr(client_module, "blake3", Blind)
    assert plain(fetched(client, 5)) != plain(tensors)


def test_a_damaged_manifest_keeps_the_store_from_starting_and_is_named(store: Store, client: SnapshotClient) -> None:
    for version in range(3):
        put(client, version, some_tensors(seed=version))
    store.kill()
    flip(store.folder / "versions" / "00000001.json", 200)
    code, said = store.refused()
    assert code == 4
    assert "version 1 (versions/00000001.json): the manifest contradicts its seal" in said
    assert "Traceback" not in said
    assert len(said.strip().splitlines()) == 1


def test_a_taken_port_keeps_the_store_from_starting(store: Store, tmp_path: Path) -> None:
    another = Store(tmp_path)
    another.port = store.port
    code, said = another.refused()
    assert code == 3
    assert f"port {store.port} on 127.0.0.1 is in use" in said
    assert "--snapshot_store.port=PORT" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_store_that_is_asked_to_stop_ends_cleanly(store: Store, number: signal.Signals) -> None:
    process, store.process = store.process, None
    assert process is not None
    process.send_signal(number)
    _, said = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 130
    assert "Traceback" not in said


def test_a_store_that_never_answers_is_given_up_with_its_address() -> None:
    pauses: list[float] = []
    url = f"http://127.0.0.1:{free()}"
    said = f"the snapshot store at {url} did not answer in 120 s: ConnectError"
    with SnapshotClient(url, sleep=pauses.append) as client, pytest.raises(StoreUnavailable, match=said):
        client.versions()
    assert pauses == [0.2, 0.4, 0.8, 1.6, 3.2, *[5.0] * 22]


def test_how_long_a_store_is_waited_for_can_be_said() -> None:
    pauses: list[float] = []
    url = f"http://127.0.0.1:{free()}"
    with (
        SnapshotClient(url, patience_s=3.5, sleep=pauses.append) as client,
        pytest.raises(StoreUnavailable, match=r"did not answer in 3\.5 s"),
    ):
        client.versions()
    assert pauses == [0.2, 0.4, 0.8, 1.6]


def test_a_store_gone_for_good_in_the_middle_of_a_download_is_given_up(store: Store) -> None:
    once = Once("down", store.kill, after=10 * MEBIBYTE)
    pauses: list[float] = []
    between = Between(store, once)
    with SnapshotClient(between.url, sleep=pauses.append) as client:
        manifest = put(client, 0, large(seed=1))
        with pytest.raises(StoreUnavailable, match=f"GET /v1/objects/{manifest.object}: no answer in 120 s"):
            list(client.tensors(manifest))
    between.close()
    assert pauses == [0.2, 0.4, 0.8, 1.6, 3.2, *[5.0] * 22]


@pytest.mark.parametrize("tensors", [some_tensors(seed=1), large(seed=1)], ids=["small", "large"])
def test_a_full_disk_of_the_store_is_a_full_disk_for_its_clients(store: Store, tensors: list[RawTensor]) -> None:
    assert store.process is not None
    resource.prlimit(store.process.pid, resource.RLIMIT_FSIZE, (1024, resource.RLIM_INFINITY))
    pauses: list[float] = []
    with SnapshotClient(store.url, sleep=pauses.append) as client:
        with pytest.raises(OSError, match="File too large") as full:
            put(client, 0, tensors)
        assert Path(full.value.filename).parent == store.folder / "objects"
        assert pauses == [0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0], "room may be made meanwhile"
        resource.prlimit(store.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        put(client, 0, tensors)
        assert plain(fetched(client, 0)) == plain(tensors)
