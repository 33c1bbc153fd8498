"""Atomic file writes: the file is written under another name, synced, then renamed."""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

FULL = {
    errno.ENOSPC: ("the disk is full", "free some space"),
    errno.EDQUOT: ("the disk quota is used up", "free some space"),
    errno.EFBIG: ("a file reached the size limit (ulimit -f)", "raise the limit"),
}
"""Errors of a file without room: errno -> (problem, remedy)."""


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a file to write. It appears under `path` when the block succeeds; an error leaves no file, names `path`.

    A device, a pipe or an open file, for example /dev/stdout, is written to directly, after what it holds: a rename
    would replace it for every program.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if is_special(path):
        with with_filename(path), _open_special(path) as file:
            yield file
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with with_filename(path), partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        sync_folder(path.parent)
    except BaseException as error:
        with suppress(OSError):  # the error of the block matters, and the folder may be read-only or no folder
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename == str(partial):
            error.filename = str(path)
        raise


def is_special(path: Path) -> bool:
    """Whether the path names a device, a pipe, or an open file of a process, such as /dev/stdout."""
    of_process = (path.is_symlink() and path.absolute().is_relative_to("/dev")) or path.is_relative_to("/proc")
    return path.exists() and (of_process or not path.is_file())


def _open_special(path: Path) -> BinaryIO:
    number = _open_file(path)
    if number is None:
        return os.fdopen(os.open(path, os.O_WRONLY | os.O_APPEND), "wb")
    sys.stdout.flush()  # what was printed before comes first
    sys.stderr.flush()
    return os.fdopen(os.dup(number), "wb")  # with the place of the open file, which opening it again would not have


def _open_file(path: Path) -> int | None:
    """Return N if the path leads to /proc/self/fd/N, as /dev/stdout and /dev/fd/N do; else None."""
    while True:
        if path.name.isdigit() and os.path.realpath(path.parent) == f"/proc/{os.getpid()}/fd":
            return int(path.name)
        if not path.is_symlink():
            return None
        path = path.parent / path.readlink()


def write(path: Path, body: bytes) -> None:
    """Write a file atomically."""
    with atomic_write(path) as file:
        file.write(body)


@contextmanager
def with_filename(path: Path | str) -> Iterator[None]:
    """Add this path to an OSError of the block that names no file, for example one of `write`."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def sync_folder(folder: Path) -> None:
    """Make renames and deletions in this folder durable (fsync)."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
