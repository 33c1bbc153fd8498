"""Downloads that the processes of one machine share: each object is transferred once.

    <folder>/<blake3>        the bytes of a version: its object, or its parts one after another
    <folder>/lock            held while a process downloads

A process compares the file with its digest before it uses it, and downloads a damaged one again. It opens the file
first, so that another process may remove or replace the name. Processes compare at the same time: the lock is held only
for a download. Where the folder cannot be used, for example on a full disk, a process reads the store directly.
"""

import errno
import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from palimpsest.common.files import atomic_write
from palimpsest.common.logs import logger
from palimpsest.common.snapshots.frames import Hashed
from palimpsest.common.snapshots.manifest import Damaged, Manifest
from palimpsest.common.snapshots.retrying_http import CHUNK
from palimpsest.common.snapshots.walker import VersionSource
from palimpsest.common.time_limits import limit_s
from palimpsest.common.versions import Version

KEPT = 8
"""Newest objects that stay in the folder, most of them deltas. The workers load the newest version; the ranks of a
learner move together over those that a batch may hold, which are at most learner.max_staleness older. With more than
about six of these, ranks come back to objects that are gone. One of them downloads it again, which costs only time."""
PATIENCE_S = 60.0
"""Time for which a process waits for another one's download of an object without bytes, in seconds (time_limits.py). A
process that is paused must not hold up the others."""
LOOK_S = 0.02
"""Time between two looks at the lock, in seconds."""


class SharedObjects:
    """A VersionSource (walker.py) in front of the store."""

    def __init__(self, store: VersionSource, folder: Path, *, begins: bool = True) -> None:
        """begins: create the folder. False: read the store directly while no other process of the machine has created
        it, because no other process would read the file."""
        self._store, self._folder, self._begins = store, folder, begins
        self._warned = self._impatient = False

    def manifest(self, version: Version) -> Manifest:
        """See VersionSource."""
        return self._store.manifest(version)

    @contextmanager
    def object(self, manifest: Manifest) -> Iterator[Iterator[bytes]]:
        """See VersionSource."""
        file = self._shared(manifest)
        if file is None:
            with self._store.object(manifest) as chunks:
                yield chunks
            return
        with file:
            yield _chunks(file)

    def _shared(self, manifest: Manifest) -> BinaryIO | None:
        """Open the object's verified file. None if the folder is not there or cannot be used."""
        if not (self._begins or self._folder.is_dir()):
            return None
        try:
            return self._opened(manifest)
        except OSError as error:
            if not self._warned:
                logger().warning(
                    "downloading without sharing: the folder that the processes of this machine share cannot be used; "
                    "correct that, for example free some space",
                    folder=str(self._folder),
                    reason=str(error),
                )
            self._warned = True
            return None

    def _opened(self, manifest: Manifest) -> BinaryIO:
        """Open the object's verified file, after a download if it is missing or damaged.

        Raises OSError if the folder cannot be used, and as VersionSource.object.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / manifest.object
        with ExitStack() as stack:  # closes a damaged file at the end: until then no other file can be the same one
            found = _open(path)
            if found is not None:
                if _is_whole(found, manifest):
                    with suppress(OSError):  # of another user
                        os.utime(found.fileno())
                    return found
                stack.callback(found.close)
            with self._locked(manifest.object_size):
                file = _open(path)
                if file is not None and found is not None and _same(file, found):
                    file.close()
                    file = None
                if file is None:  # no other process has downloaded it meanwhile
                    self._download(manifest, path)
                    file = path.open("rb")
            if not _is_whole(file, manifest):
                file.close()
                raise OSError(errno.EIO, "a file has other bytes than were written", str(path))
            return file

    @contextmanager
    def _locked(self, size: int) -> Iterator[None]:
        """Hold the lock. size: bytes of the object. Raises TimeoutError if another process holds it for too long.

        After that, this process does not wait any more, until it finds the lock free.
        """
        deadline = time.monotonic() + (0.0 if self._impatient else limit_s(PATIENCE_S, size))
        with (self._folder / "lock").open("wb") as lock:
            while True:
                with suppress(BlockingIOError):
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                if time.monotonic() > deadline:
                    self._impatient = True
                    raise TimeoutError(errno.ETIMEDOUT, "another process has not ended its download", lock.name)
                time.sleep(LOOK_S)
            self._impatient = False
            yield

    def _download(self, manifest: Manifest, path: Path) -> None:
        if shutil.disk_usage(self._folder).free < manifest.object_size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        with atomic_write(path) as partial, self._store.object(manifest) as chunks:
            for chunk in chunks:
                partial.write(chunk)
        self._remove_old(path)

    def _remove_old(self, newest: Path) -> None:
        """Remove all but the newest objects, and what killed processes left. Only under the lock."""
        objects = [path for path in self._folder.iterdir() if path.name != "lock" and path != newest]
        objects.sort(key=lambda path: path.stat().st_mtime, reverse=True)
        for path in [*objects[KEPT - 1 :], *(path for path in objects if path.suffix == ".partial")]:
            with suppress(FileNotFoundError):
                path.unlink()


def _open(path: Path) -> BinaryIO | None:
    try:
        return path.open("rb")
    except FileNotFoundError:
        return None


def _same(one: BinaryIO, other: BinaryIO) -> bool:
    return os.path.samestat(os.fstat(one.fileno()), os.fstat(other.fileno()))


def _is_whole(file: BinaryIO, manifest: Manifest) -> bool:
    """Compare the bytes of an open file with their digest; return to its start. An unreadable file is not whole."""
    try:
        Hashed(_chunks(file), manifest).verify()
        file.seek(0)
    except (Damaged, OSError):
        return False
    return True


def _chunks(file: BinaryIO) -> Iterator[bytes]:
    return iter(lambda: file.read(CHUNK), b"")
