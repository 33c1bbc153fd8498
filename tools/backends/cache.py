"""Cache of the programs that take minutes to download or build. An entry is either complete or absent."""

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from palimpsest.common.user_error import ExitCode, UserError

Say = Callable[[str], None]


def folder() -> Path:
    """Return `$PALIMPSEST_CACHE`, or `palimpsest` in the cache folder of the user."""
    if named := os.environ.get("PALIMPSEST_CACHE"):
        return Path(named).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "palimpsest"


def made(name: str, make: Callable[[Path], None], say: Say) -> Path:
    """Return the cache entry `name`. If it is missing, `make` fills a temporary folder, which is then renamed."""
    target = folder() / name
    if target.is_dir():
        return target
    try:
        folder().mkdir(parents=True, exist_ok=True)
        with locked(folder() / f"{name}.lock", lambda: say(f"waiting for another process that downloads {name}")):
            if not target.is_dir():
                partial = target.with_name(f"{name}.partial")
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                make(partial)
                partial.rename(target)
    except OSError as error:
        raise UserError(
            f"{name} cannot be kept in {folder()} ({error}); name another folder in PALIMPSEST_CACHE",
            ExitCode.UNAVAILABLE,
        ) from None
    return target


@contextmanager
def locked(path: Path, waits: Callable[[], None]) -> Iterator[None]:
    """Hold this lock file. Calls `waits` once if another process holds it. The kernel releases it at exit."""
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waits()
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def megabytes(path: Path) -> float:
    """Return the size of all files in this folder, in MB."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) / 1e6
