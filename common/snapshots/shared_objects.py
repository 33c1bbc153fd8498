"""Downloads that the processes of one machine share: each object is transferred once.

    <folder>/<blake3>        the bytes of a version: its object, or its parts one after another
    <folder>/lock            held while a process downloads

A process compares the file with its digest before it uses it, and downloads a damaged one again.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from palimpsest.common.files import atomic_write
from palimpsest.common.snapshots.client import SnapshotClient
from palimpsest.common.snapshots.frames import Hashed
from palimpsest.common.snapshots.manifest import Damaged, Manifest
from palimpsest.common.snapshots.retrying_http import CHUNK
from palimpsest.common.versions import Version

KEPT = 4
"""Newest objects that stay in the folder. A process that lags further behind downloads again."""


class SharedObjects:
    """A VersionSource (walker.py) in front of the store."""

    def __init__(self, store: SnapshotClient, folder: Path) -> None:
        self._store, self._folder = store, folder
        folder.mkdir(parents=True, exist_ok=True)

    def manifest(self, version: Version) -> Manifest:
        """See VersionSource."""
        return self._store.manifest(version)

    @contextmanager
    def object(self, manifest: Manifest) -> Iterator[Iterator[bytes]]:
        """See VersionSource. Raises OSError if the disk is full."""
        with self._opened(manifest) as file:
            yield iter(lambda: file.read(CHUNK), b"")

    @contextmanager
    def _opened(self, manifest: Manifest) -> Iterator[BinaryIO]:
        path = self._folder / manifest.object
        with (self._folder / "lock").open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            file = _verified(path, manifest)
            if file is None:
                with atomic_write(path) as partial, self._store.object(manifest) as chunks:
                    for chunk in chunks:
                        partial.write(chunk)
                self._remove_old()
                file = path.open("rb")
            else:
                os.utime(path)
        with file:  # open, so that another process may remove the name
            yield file

    def _remove_old(self) -> None:
        """Remove all but the newest objects, and what killed processes left. Only under the lock."""
        objects = [path for path in self._folder.iterdir() if path.name != "lock"]
        objects.sort(key=lambda path: path.stat().st_mtime, reverse=True)
        for path in [*objects[KEPT:], *(path for path in objects if path.suffix == ".partial")]:
            with suppress(FileNotFoundError):
                path.unlink()


def _verified(path: Path, manifest: Manifest) -> BinaryIO | None:
    """Open the object's file at its start; None if it does not exist or is damaged."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return None
    try:
        Hashed(iter(lambda: file.read(CHUNK), b""), manifest).verify()
    except Damaged:
        file.close()
        return None
    file.seek(0)
    return file
