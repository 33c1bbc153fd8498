"""The snapshot store in a separate process: kills, refusals, stops and a full disk.

The tests share one process, and tests that kill it restart it. Stored versions stay, so each test uses its own version
numbers, which are also the seeds of the weights.
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
"""Pauses of a client that retries for 120 s."""


class Store(StoreProcess):
    """Store process over one folder."""

    def __init__(self, home: Path) -> None:
        self.folder = home / "runs" / "t" / "snapshots"
        run = home / "run.toml"
        run.write_text(RUN.format(folder=home / "runs"))
        super().__init__(run)

    def objects(self) -> set[str]:
        """Names of all files below objects/, including hidden ones."""
        return {path.name for path in self.folder.glob("objects/*")}

    def partial(self) -> int:
        """Bytes of unfinished uploads."""
        return sum(path.stat().st_size for path in self.folder.glob("objects/.*.partial"))


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """The store of this module, with writer 1."""
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
    """The running store."""
    if shared.process is None:
        shared.start()
    shared.ready()
    return shared


@pytest.fixture
def version() -> int:
    """A version that no other test uses; the next nine are unused too."""
    return 10 * next(VERSIONS)


@pytest.fixture
def client(store: Store) -> Iterator[SnapshotClient]:
    with SnapshotClient(store.url) as opened:
        yield opened


class Between:
    """Proxy between client and store; it calls `before` with the direction and the bytes of each piece."""

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
    """Calls `act` once: when `after` bytes have passed in this direction and the piece contains `text`."""

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


def test_an_upload_succeeds_although_the_store_is_killed_and_restarted(store: Store, version: int) -> None:
    once, before = Once("up", store.again, after=10 * MEBIBYTE), store.objects()
    for client in through(store, once):
        manifest = put(client, version, large(seed=version))
        assert store.objects() - before == {manifest.object}
        assert plain(fetched(client, version)) == plain(large(seed=version))


def test_versions_and_leases_survive_a_kill_and_unfinished_uploads_do_not(
    store: Store, client: SnapshotClient, version: int
) -> None:
    for number in range(version, version + 3):
        put(client, number, some_tensors(seed=number))
    client.lease("replica", Version(version))
    body, before = large(seed=version)[0].raw.tobytes(), store.objects()
    with socket.create_connection(("127.0.0.1", store.port)) as sender:
        digest = blake3(body).hexdigest()
        head = f"PUT /v1/objects/{digest} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        sender.sendall(head.encode() + body[: 4 * MEBIBYTE])
        eventually(lambda: store.partial() > MEBIBYTE)
        store.kill()
    assert [name[-8:] for name in store.objects() - before] == [".partial"]
    store.start()
    store.ready()
    assert store.objects() <= before
    assert plain(fetched(client, version)) == plain(some_tensors(seed=version))
    client.lease("learner", Version(version + 2))
    assert httpx.get(f"{store.url}/v1/status", timeout=LIMIT_S).json()["leases"] == {
        "replica": version,
        "learner": version + 2,
    }
    client.lease("replica", Version(version + 1))
    eventually(lambda: client.versions() == [version + 1, version + 2])


def test_a_download_succeeds_although_the_store_is_killed_and_restarted(store: Store, version: int) -> None:
    once = Once("down", store.again, after=10 * MEBIBYTE)
    for client in through(store, once):
        put(client, version, large(seed=version))
        assert plain(fetched(client, version)) == plain(large(seed=version))


def test_weights_swept_before_their_manifest_arrives_are_sent_again(store: Store, version: int) -> None:
    """The store dies after the upload; the restarted store sweeps the object, which no manifest names."""
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


def test_a_store_with_a_damaged_manifest_does_not_start_and_names_it(tmp_path: Path) -> None:
    damaged = Store(tmp_path)
    with FolderStore(damaged.folder, sweep_s=3600) as served, SnapshotClient(served.url) as client:
        Writer(client).begin()
        for version in range(3):
            put(client, version, some_tensors(seed=version))
    flip(damaged.folder / "versions" / "00000001.json", 200)
    code, output = damaged.refused()
    assert code == 4
    assert "version 1 (versions/00000001.json): the manifest contradicts its seal" in output
    assert "Traceback" not in output
    assert len(output.strip().splitlines()) == 1


def test_a_store_does_not_start_on_a_port_in_use(store: Store, tmp_path: Path) -> None:
    another = Store(tmp_path)
    another.port = store.port
    code, output = another.refused()
    assert code == 3
    assert f"port {store.port} on 127.0.0.1 is in use" in output
    assert "--snapshot_store.port=PORT" in output
    assert "Traceback" not in output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_store_ends_cleanly_on_a_signal(store: Store, number: signal.Signals) -> None:
    process, store.process = store.process, None
    assert process is not None
    process.send_signal(number)
    _, output = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 130
    assert "Traceback" not in output


def test_a_download_fails_if_the_store_does_not_return(store: Store, version: int) -> None:
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
def test_a_full_disk_of_the_store_raises_os_error_at_its_clients(
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
            # a connection that breaks under the upload begins the pauses again
            assert pauses[-7:] == [*PAUSES[:5], 5.0, 5.0], "the client retries, since space may be freed"
            resource.prlimit(store.process.pid, resource.RLIMIT_FSIZE, unlimited)
            put(client, version, tensors(version))
            assert plain(fetched(client, version)) == plain(tensors(version))
    finally:
        resource.prlimit(store.process.pid, resource.RLIMIT_FSIZE, unlimited)
