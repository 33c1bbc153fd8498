"""Atomic creation of a folder: files are written to a neighboring folder, which is then renamed."""

import ctypes
import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from palimpsest.common.files import sync_folder
from palimpsest.common.user_error import UserError
from palimpsest.export import layout
from palimpsest.export.model_card import TAGS

AT_FDCWD, RENAME_EXCHANGE = -100, 2
MARK = f"\n- {TAGS[0]}\n"
"""Text in the header of every model card of an export."""


def refuse_occupied(folder: Path, *, overwrite: bool) -> None:
    """Raise UserError if the folder contains files that the export must not replace."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"{folder} is a file: name a new or an empty folder for the model")
    held = {entry.name for entry in folder.iterdir()}
    if not held:
        return
    if not overwrite:
        raise UserError(f"{folder} is not empty: name another folder, or replace the model in it with --overwrite")
    card = folder / layout.CARD
    folders = {name for name in held - {layout.CHAT_TEMPLATES} if (folder / name).is_dir()}
    if folders or not card.is_file() or MARK not in card.read_text(encoding="utf-8", errors="replace"):
        what = f"it holds the folder {min(folders)}" if folders else f"no {layout.CARD} with the tag {TAGS[0]} is in it"
        raise UserError(
            f"{folder} is not a model that this command wrote ({what}), so --overwrite does not replace it: name "
            f"another folder"
        )


@contextmanager
def new_folder(folder: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yield a new folder. It replaces `folder` when the block ends, and is removed if the block raises.

    Raises UserError if `folder` must not be replaced.
    """
    refuse_occupied(folder, overwrite=overwrite)
    place = folder.resolve()  # keep a symbolic link to a folder
    partial = place.with_name(f".{place.name}.{os.getpid()}.partial")
    place.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        yield partial
        for inside in (path for path in partial.rglob("*") if path.is_dir()):
            sync_folder(inside)
        sync_folder(partial)
        refuse_occupied(folder, overwrite=overwrite)  # another process may have written to it
        _put(partial, place)
        sync_folder(place.parent)
    except OSError as error:
        if isinstance(error.filename, str | os.PathLike) and Path(error.filename).is_relative_to(partial):
            error.filename = str(folder)  # the user named `folder`
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # the replaced folder, or a partial one


def _put(new: Path, place: Path) -> None:
    """Rename `new` to `place`. Files that were at `place` move to `new`."""
    if not place.exists() or not any(place.iterdir()):
        new.replace(place)
    elif not _exchange(new, place):
        replaced = new.with_suffix(".replaced")  # `place` is missing until the next rename
        place.rename(replaced)
        try:
            new.rename(place)
        except OSError:
            replaced.rename(place)
            raise
        replaced.rename(new)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders atomically. Returns False if the system or the file system does not support it."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    if libc.renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0:
        return True
    if (number := ctypes.get_errno()) in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(other))
