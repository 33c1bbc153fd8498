"""Downloads that processes of one machine share: one transfer for each object, compared with its digest by everyone.

Threads with an own lock file handle each stand for processes: flock treats them alike.
"""

import errno
import fcntl
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import pytest
from structlog.testing import capture_logs

from palimpsest.common.snapshots import shared_objects
from palimpsest.common.snapshots.ahead import FetchAhead
from palimpsest.common.snapshots.manifest import Damaged, Manifest
from palimpsest.common.snapshots.raw_file import RawFile
from palimpsest.common.snapshots.shared_objects import KEPT, SharedObjects
from palimpsest.common.snapshots.walker import Walker
from palimpsest.common.versions import Version
from tests.processes.waiting import LIMIT_S
from tests.servers.stored_weights import flip
from tests.unit.common.test_walker import Versions, a_chain, held

READERS = 4


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_objects, "PATIENCE_S", LIMIT_S)


def read(source: SharedObjects | Versions, manifest: Manifest) -> bytes:
    with source.object(manifest) as chunks:
        return b"".join(chunks)


def all_read(sources: list[SharedObjects], manifest: Manifest) -> list[bytes]:
    with ThreadPoolExecutor(len(sources)) as pool:
        return list(pool.map(lambda source: read(source, manifest), sources))


def together(monkeypatch: pytest.MonkeyPatch, name: str, readers: int) -> None:
    """Let this many readers arrive at a function before any of them enters it."""
    barrier = threading.Barrier(readers, timeout=LIMIT_S)
    real: Callable[..., object] = getattr(SharedObjects, name)
    passed = threading.local()

    def met(self: SharedObjects, *arguments: object) -> object:
        if not hasattr(passed, "once"):
            passed.once = True
            barrier.wait()
        return real(self, *arguments)

    monkeypatch.setattr(SharedObjects, name, met)


def test_one_of_several_readers_transfers_an_object(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    together(monkeypatch, "_locked", READERS)  # all have seen that the file is missing
    store = a_chain()
    manifest = store.manifests[Version(0)]
    sources = [SharedObjects(store, tmp_path / "o") for _ in range(READERS)]
    assert all_read(sources, manifest) == [store.objects[manifest.object]] * READERS
    assert store.served == 1
    assert {path.name for path in (tmp_path / "o").iterdir()} == {manifest.object, "lock"}


def test_walks_of_several_readers_transfer_each_object_once(tmp_path: Path) -> None:
    store = a_chain()
    ahead = [FetchAhead(SharedObjects(store, tmp_path / "o")) for _ in range(READERS)]
    copies = [RawFile(tmp_path / f"{number}") for number in range(READERS)]
    walkers = [Walker(source, copy) for source, copy in zip(ahead, copies, strict=True)]
    for walker in walkers:
        walker.move(Version(1))
    assert store.served == 2
    for source in ahead:
        source.begin(Version(1), Version(3))
    for source, walker, copy in zip(ahead, walkers, copies, strict=True):
        source.wait()
        for version in map(Version, (3, 1, 2)):
            walker.move(version)
            assert held(walker, copy) == store.copies[version]
    assert store.served == 4


def test_readers_compare_a_file_with_its_digest_at_the_same_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = a_chain()
    manifest = store.manifests[Version(0)]
    read(SharedObjects(store, tmp_path), manifest)
    barrier, real = threading.Barrier(READERS, timeout=LIMIT_S), shared_objects._is_whole

    def compared(file: BinaryIO, of: Manifest) -> bool:
        barrier.wait()  # never passes if one reader waits for another
        return real(file, of)

    monkeypatch.setattr(shared_objects, "_is_whole", compared)
    with held_lock(tmp_path):
        read_by_all = all_read([SharedObjects(store, tmp_path) for _ in range(READERS)], manifest)
    assert read_by_all == [store.objects[manifest.object]] * READERS
    assert store.served == 1


@contextmanager
def held_lock(folder: Path) -> Iterator[None]:
    """A process that downloads."""
    with (folder / "lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def test_a_damaged_file_is_transferred_again_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = a_chain()
    manifest = store.manifests[Version(0)]
    read(SharedObjects(store, tmp_path), manifest)
    flip(tmp_path / manifest.object, manifest.object_size // 2)
    together(monkeypatch, "_locked", READERS)  # all have seen the damage
    sources = [SharedObjects(store, tmp_path) for _ in range(READERS)]
    assert all_read(sources, manifest) == [store.objects[manifest.object]] * READERS
    assert store.served == 2
    assert (tmp_path / manifest.object).read_bytes() == store.objects[manifest.object]


def test_a_file_that_is_removed_or_replaced_while_it_is_read_is_read_to_its_end(tmp_path: Path) -> None:
    store = a_chain()
    manifest = store.manifests[Version(0)]
    source, path = SharedObjects(store, tmp_path), tmp_path / manifest.object
    with source.object(manifest) as chunks:
        path.unlink()
        path.write_bytes(b"another")
        assert b"".join(chunks) == store.objects[manifest.object]


def test_what_the_store_damages_is_not_kept(tmp_path: Path) -> None:
    store = a_chain()
    manifest = store.manifests[Version(0)]
    store.objects[manifest.object] += b"."
    with pytest.raises(Damaged):
        read(SharedObjects(store, tmp_path), manifest)
    assert not (tmp_path / manifest.object).exists()


def test_the_newest_objects_stay_and_what_killed_processes_left_goes(tmp_path: Path) -> None:
    store = a_chain(KEPT + 2)
    source = SharedObjects(store, tmp_path)
    (tmp_path / ".left.1.partial").touch()
    manifests = [store.manifests[Version(version)] for version in range(KEPT + 2)]
    for age, manifest in enumerate(manifests[:-1]):
        read(source, manifest)
        os.utime(tmp_path / manifest.object, (1 + age, 1 + age))
    read(source, manifests[1])  # used now
    read(source, manifests[-1])
    stay = {manifest.object for manifest in (manifests[1], *manifests[-KEPT + 1 :])}
    assert {path.name for path in tmp_path.iterdir()} == {*stay, "lock"}


def full(_path: Path) -> Iterator[None]:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("fault", ["no room", "full while it writes", "a file with its name", "no lock", "other bytes"])
def test_without_a_usable_folder_a_reader_reads_the_store_and_warns_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    store, folder = a_chain(), tmp_path / "o"
    source, manifests = SharedObjects(store, folder), [store.manifests[Version(version)] for version in (0, 1)]
    match fault:
        case "no room":
            monkeypatch.setattr(shared_objects.shutil, "disk_usage", lambda _: type("", (), {"free": 1}))
        case "full while it writes":
            monkeypatch.setattr(shared_objects, "atomic_write", contextmanager(full))
        case "a file with its name":
            folder.touch()
        case "no lock":
            monkeypatch.setattr(shared_objects.fcntl, "flock", no_locks)
        case "other bytes":
            monkeypatch.setattr(shared_objects, "_is_whole", lambda *_: False)
    with capture_logs() as logs:
        for manifest in manifests:
            assert read(source, manifest) == store.objects[manifest.object]
    (warning,) = logs
    assert (warning["log_level"], warning["folder"]) == ("warning", str(folder))
    assert warning["reason"]


def no_locks(_file: BinaryIO, _operation: int) -> None:
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


def test_a_process_that_is_paused_in_its_download_holds_up_the_others_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_objects, "PATIENCE_S", 0.0)
    store = a_chain()
    manifests = [store.manifests[Version(version)] for version in range(3)]
    source = SharedObjects(store, tmp_path)
    with held_lock(tmp_path), capture_logs() as logs:
        assert read(source, manifests[0]) == store.objects[manifests[0].object]
        monkeypatch.setattr(shared_objects, "PATIENCE_S", LIMIT_S)
        assert read(source, manifests[1]) == store.objects[manifests[1].object]
        assert "has not ended its download" in logs[0]["reason"]
    assert {path.name for path in tmp_path.iterdir()} == {"lock"}
    read(source, manifests[2])
    assert (tmp_path / manifests[2].object).exists()


def test_a_reader_that_does_not_begin_the_folder_joins_one_that_is_there(tmp_path: Path) -> None:
    store, folder = a_chain(), tmp_path / "o"
    manifest = store.manifests[Version(0)]
    guest = SharedObjects(store, folder, begins=False)
    assert read(guest, manifest) == store.objects[manifest.object]
    assert not folder.exists()
    read(SharedObjects(store, folder), manifest)
    assert read(guest, manifest) == store.objects[manifest.object]
    assert store.served == 2
