"""The snapshot store as a process of its own: killed at any moment, refused, stopped, out of disk.

The tests share one process, which those that kill it start again. So what they store stays: each takes versions of
its own, which are also the seeds of its weights.
"""

import itertools
import resource
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
from blake3 import blake3

from palimpsest.common.snapshots.client import RawTensor, SnapshotClient, StoreUnavailable
from palimpsest.common.snapshots.writer import Writer
from palimpsest.common.versions import Version
from tests.servers.stored_weights import MEBIBYTE, fetched, flip, large, plain, put, some_tensors
from tests.servers.stores import LIMIT_S, FolderStore, StoreProcess, eventually

pytestmark = pytest.mark.servers

RUN = """
run.id = "t"
run.folder = "{folder}"
model.path = "none"
tasks.environments = {{ lookup = 1.0 }}
learner.versions = 1
snapshot_store.sweep_s = 0.05
"""
VERSIONS = itertools.count()
PAUSES = [0.2, 0.4, 0.8, 1.6, 3.2, *[5.0] * 22]
"""Of a client that tries for 120 s."""


class Store(StoreProcess):
    """Over one folder."""

    def __init__(self, home: Path) -> None:
        self.folder = home / "runs" / "t" / "snapshots"
        run = home / "run.toml"
        run.write_text(RUN.format(folder=home / "runs"))
        super().__init__(run)

    def objects(self) -> set[str]:
        """Every file below objects/, hidden ones too."""
        return {path.name for path in self.folder.glob("objects/*")}

    def partial(self) -> int:
        """Bytes of uploads that are not finished."""
        return sum(path.stat().st_size for path in self.folder.glob("objects/.*.partial"))


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """The one of this module; writer 1 has begun."""
    made = Store(tmp_path_factory.mktemp("store"))
    try:
        made.start()
        made.ready()
        with SnapshotClient(made.url) as first:
            Writer(first).begin()
        yield made
    finally:
        made.kill()


@pytest.fixture
def store(shared: Store) -> Store:
    """It answers."""
    if shared.process is None:
        shared.start()
    shared.ready()
    return shared


@pytest.fixture
def version() -> int:
    """One that no other test uses; the one after it is free as well."""
    return 10 * next(VERSIONS)


@pytest.fixture
def client(store: Store) -> Iterator[SnapshotClient]:
    with SnapshotClient(store.url) as opened:
        yield opened


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


def test_a_store_killed_in_the_middle_of_an_upload_costs_only_time(store: Store, version: int) -> None:
    once, before = Once("up", store.again, after=10 * MEBIBYTE), store.objects()
    for client in through(store, once):
        manifest = put(client, version, large(seed=version))
        assert store.objects() - before == {manifest.object}
        assert plain(fetched(client, version)) == plain(large(seed=version))


def test_a_killed_store_leaves_versions_and_leases_to_the_next_and_no_half_upload(
    store: Store, client: SnapshotClient, version: int
) -> None:
    for number in range(version, version + 3):
        put(client, number, some_tensors(seed=number))
    client.lease("replica", Version(version))
    body, before = large(seed=version)[0].raw.tobytes(), store.objects()
    with socket.create_connection(("127.0.0.1", store.port)) as sender:
        digest = blake3(body).hexdigest()
        head = f"PUT /v1/objects/{digest} HTTP/1.1\r\nHost: s\r\nContent-Length: {len(body)}\r\n\r\n"
        sender.sendall(head.encode() + body[: 4 * MEBIBYTE])
        eventually(lambda: store.partial() > MEBIBYTE)
        store.kill()
    assert [name[-8:] for name in store.objects() - before] == [".partial"]
    store.start()
    store.ready()
    assert store.objects() <= before
    assert plain(fetched(client, version)) == plain(some_tensors(seed=version))
    client.lease("learner", Version(version + 2))
    assert httpx.get(f"{store.url}/v1/status").json()["leases"] == {"replica": version, "learner": version + 2}
    client.lease("replica", Version(version + 1))
    eventually(lambda: client.versions() == [version + 1, version + 2])


def test_a_store_killed_in_the_middle_of_a_download_costs_only_time(store: Store, version: int) -> None:
    once = Once("down", store.again, after=10 * MEBIBYTE)
    for client in through(store, once):
        put(client, version, large(seed=version))
        assert plain(fetched(client, version)) == plain(large(seed=version))


def test_weights_that_vanish_before_their_manifest_comes_are_sent_again(store: Store, version: int) -> None:
    """The store dies after the upload; the one that starts knows nothing of it and sweeps."""
    before = store.objects()

    def swept() -> None:
        assert store.objects() != before
        store.again()
        eventually(lambda: store.objects() == before)

    once = Once("up", swept, text=b"PUT /v1/versions/%d " % version)
    for client in through(store, once):
        put(client, version, some_tensors(seed=version))
        assert version in client.versions()
        assert plain(fetched(client, version)) == plain(some_tensors(seed=version))


def test_a_damaged_manifest_keeps_the_store_from_starting_and_is_named(tmp_path: Path) -> None:
    damaged = Store(tmp_path)
    with FolderStore(damaged.folder, sweep_s=3600) as served, SnapshotClient(served.url) as client:
        Writer(client).begin()
        for version in range(3):
            put(client, version, some_tensors(seed=version))
    flip(damaged.folder / "versions" / "00000001.json", 200)
    code, said = damaged.refused()
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


def test_a_store_gone_for_good_in_the_middle_of_a_download_is_given_up(store: Store, version: int) -> None:
    once = Once("down", store.kill, after=10 * MEBIBYTE)
    pauses: list[float] = []
    between = Between(store, once)
    with SnapshotClient(between.url, sleep=pauses.append) as client:
        manifest = put(client, version, large(seed=version))
        with pytest.raises(StoreUnavailable, match=f"GET /v1/objects/{manifest.object}: no answer in 120 s"):
            list(client.tensors(manifest))
    between.close()
    assert pauses == PAUSES


@pytest.mark.parametrize("tensors", [some_tensors, large])
def test_a_full_disk_of_the_store_is_a_full_disk_for_its_clients(
    store: Store, version: int, tensors: Callable[[int], list[RawTensor]]
) -> None:
    assert store.process is not None
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    pauses: list[float] = []
    resource.prlimit(store.process.pid, resource.RLIMIT_FSIZE, (1024, resource.RLIM_INFINITY))
    try:
        with SnapshotClient(store.url, sleep=pauses.append) as client:
            with pytest.raises(OSError, match="File too large") as full:
                put(client, version, tensors(version))
            assert Path(full.value.filename).parent == store.folder / "objects"
            assert pauses == [*PAUSES[:5], 5.0, 5.0], "room may be made meanwhile"
            resource.prlimit(store.process.pid, resource.RLIMIT_FSIZE, unlimited)
            put(client, version, tensors(version))
            assert plain(fetched(client, version)) == plain(tensors(version))
    finally:
        resource.prlimit(store.process.pid, resource.RLIMIT_FSIZE, unlimited)
