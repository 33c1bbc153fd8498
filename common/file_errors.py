"""Files and folders that the system does not let this program use, as sentences that say what to do."""

import contextlib
import errno
import getpass
import os
import pwd
import stat
from collections.abc import Iterator
from pathlib import Path

from palimpsest.common.files import FULL
from palimpsest.common.user_error import ExitCode, UserError

RIGHTS = frozenset((errno.EACCES, errno.EPERM))
"""No right to it: whose it is belongs to the sentence."""
BLOCKED = {
    errno.EACCES: ("permission denied", "give that user the right to it (`chown`, `chmod`)"),
    errno.EPERM: ("the system does not permit it", "give that user the right to it (`chown`, `chmod`, `lsattr`)"),
    errno.EROFS: ("the file system is read-only", "mount it writable"),
    errno.ENOTDIR: ("a part of that path is a file, not a folder", "move the file away"),
    errno.EEXIST: ("there is a file where a folder is needed", "move the file away"),
    errno.EISDIR: ("there is a folder where a file is needed", "move the folder away"),
    errno.ENAMETOOLONG: ("the name is too long for this file system", "choose a shorter one"),
    errno.ELOOP: ("its symbolic links lead in a circle", "mend them"),
}
"""A path that cannot be used, with room or without: errno -> what that is, what to do."""


@contextlib.contextmanager
def file_errors_as_user_errors() -> Iterator[None]:
    """A UserError in place of an error of this block that says that a file cannot be written or used."""
    try:
        yield
    except OSError as error:
        if (refusal := user_error_for(error)) is None:
            raise
        raise refusal from None


def user_error_for(error: OSError) -> UserError | None:
    """The sentence for this error; None if it is none of a file that cannot be used."""
    path = error.filename if isinstance(error.filename, str | os.PathLike) else None
    if error.errno in FULL:
        what, mend = FULL[error.errno]
        where = f" (writing {error.filename})" if error.filename else ""
        said = f"{what}{where}: {mend} and start again; a run goes on from its last checkpoint"
        return UserError(said, ExitCode.UNAVAILABLE)
    if error.errno not in BLOCKED or path is None:
        return None
    what, mend = BLOCKED[error.errno]
    whose = f" ({owner(Path(path))})" if error.errno in RIGHTS else ""
    return UserError(f"{path} cannot be used: {what}{whose}. Choose another place, or {mend}")


def usable_folder(folder: Path, *, key: str) -> None:
    """Make the folder if it is missing. Raises UserError, with the key that names it, when nothing can be put into
    it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable.{os.getpid()}.partial"
        probe.touch()
        probe.unlink()
    except OSError as error:
        if error.errno in FULL:
            raise
        what, mend = BLOCKED.get(error.errno or 0, (error.strerror or str(error), "mend that"))
        whose = f" ({owner(folder)})" if error.errno in RIGHTS else ""
        raise UserError(
            f"{key}: nothing can be written to {folder}: {what}{whose}. Choose another place with "
            f"--{key}=FOLDER, or {mend}"
        ) from None


def owner(path: Path) -> str:
    """Owner and mode of the nearest visible folder or file at or above the path, and the user of this process."""
    user = _current_user()
    for place in (path, *path.absolute().parents):
        with contextlib.suppress(OSError):
            seen = place.stat()
            return f"{place} is {_user_name(seen.st_uid)}'s, {stat.filemode(seen.st_mode)}; this program runs as {user}"
    return f"this program runs as {user}"


def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"


def _current_user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"user {os.getuid()}"
