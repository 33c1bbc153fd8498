"""Layout of the storage folder, and the operations that its durability needs."""

import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3

from palimpsest.services.snapshot_store import storage_disk
from palimpsest.services.snapshot_store.storage import DigestMismatch
from palimpsest.services.snapshot_store.storage_disk import DiskStorage


async def chunks(*pieces: bytes) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


def files(folder: Path) -> dict[str, bytes]:
    """Return every file, including hidden ones."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


async def test_a_key_is_a_path_and_a_body_a_plain_file(tmp_path: Path) -> None:
    storage = DiskStorage(tmp_path)
    await storage.put("objects/a", chunks(b"one"))
    await storage.create("versions/1", b"two")
    assert files(tmp_path) == {"objects/a": b"one", "versions/1": b"two"}


async def test_a_failed_write_leaves_no_file(tmp_path: Path) -> None:
    storage = DiskStorage(tmp_path)
    with pytest.raises(DigestMismatch):
        await storage.put("a", chunks(b"x"), digest=blake3(b"y").hexdigest())
    await storage.create("b", b"first")
    await storage.create("b", b"second")
    assert files(tmp_path) == {"b": b"first"}


DIES = """
import asyncio, os, pathlib, signal, sys
from palimpsest.services.snapshot_store.storage_disk import DiskStorage

async def half():
    yield bytes(1 << 20)
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(DiskStorage(pathlib.Path(sys.argv[1])).put("objects/a", half()))
"""


async def test_temporary_files_of_a_killed_process_are_removed_at_the_next_start(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", DIES, str(tmp_path)], check=False)
    assert done.returncode == -9
    left = files(tmp_path)
    assert len(left) == 1
    assert next(iter(left)).endswith(".partial")
    assert await DiskStorage(tmp_path).keys("") == []
    assert files(tmp_path) == {}


async def test_foreign_files_stay(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert await DiskStorage(tmp_path).keys("") == ["notes.txt"]


async def test_without_the_digest_check_wrong_bytes_would_be_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    announced = blake3(b"right").hexdigest()

    class Blind:
        def update(self, _chunk: bytes) -> None: ...

        def hexdigest(self) -> str:
            return announced

    monkeypatch.setattr(storage_disk, "blake3", Blind)
    await DiskStorage(tmp_path).put("a", chunks(b"wrong"), digest=announced)
    assert files(tmp_path) == {"a": b"wrong"}


async def test_without_the_link_a_second_create_would_succeed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason that `create` links instead of renaming."""
    monkeypatch.setattr(storage_disk.os, "link", shutil.copyfile)
    storage = DiskStorage(tmp_path)
    assert [await storage.create("a", b"first"), await storage.create("a", b"second")] == [True, True]
    assert files(tmp_path) == {"a": b"second"}


async def test_bytes_are_synced_before_their_name_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a power loss, a name must never refer to unwritten bytes."""
    seen: list[tuple[str, list[str]]] = []
    real = storage_disk.os.fsync

    def watched(handle: int) -> Any:
        target = Path(f"/proc/self/fd/{handle}").readlink()
        names = sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith("."))
        seen.append(("folder" if target.is_dir() else "file", names))
        return real(handle)

    monkeypatch.setattr(storage_disk.os, "fsync", watched)
    storage = DiskStorage(tmp_path)
    await storage.put("a", chunks(b"x"))
    await storage.create("b", b"x")
    await storage.delete("a")
    assert seen == [("file", []), ("folder", ["a"]), ("file", ["a"]), ("folder", ["a", "b"]), ("folder", ["b"])]
