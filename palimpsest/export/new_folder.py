"""A folder that is whole or not there: written beside its place, then renamed."""

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
"""What the cards of exported models have in their header."""


def refuse_occupied(folder: Path, *, overwrite: bool) -> None:
    """Raises UserError when something is in the folder that must not be replaced."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"{folder} is a file: name a folder for the model, one that is empty or not there yet")
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
    """A folder to fill. It takes the place of `folder` when the block ends well; after an error nothing is left.

    Raises UserError when `folder` may not be replaced.
    """
    refuse_occupied(folder, overwrite=overwrite)
    place = folder.resolve()  # a link to a folder stays one
    partial = place.with_name(f".{place.name}.{os.getpid()}.partial")
    place.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        yield partial
        for inside in (path for path in partial.rglob("*") if path.is_dir()):
            sync_folder(inside)
        sync_folder(partial)
        refuse_occupied(folder, overwrite=overwrite)  # it may have been filled meanwhile
        _put(partial, place)
        sync_folder(place.parent)
    except OSError as error:
        if isinstance(error.filename, str | os.PathLike) and Path(error.filename).is_relative_to(partial):
            error.filename = str(folder)  # the name that a person knows
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # what was replaced, or what is not whole


def _put(new: Path, place: Path) -> None:
    """Rename `new` to `place`; what was at `place` is at `new` then."""
    if not place.exists() or not any(place.iterdir()):
        new.replace(place)
    elif not _exchange(new, place):
        replaced = new.with_suffix(".replaced")  # for this moment there is nothing at the place
        place.rename(replaced)
        try:
            new.rename(place)
        except OSError:
            replaced.rename(place)
            raise
        replaced.rename(new)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step; False where the system or the file system cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    if libc.renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0:
        return True
    if (number := ctypes.get_errno()) in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(other))
