"""Error texts for files and folders that the program cannot use. Each text says what to do."""

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
"""Missing permission. The error text names the owner of the file."""
BLOCKED = {
    errno.EACCES: ("permission denied", "give that user permission (`chown`, `chmod`)"),
    errno.EPERM: ("the system does not permit it", "give that user permission (`chown`, `chmod`, `lsattr`)"),
    errno.EROFS: ("the file system is read-only", "mount it writable"),
    errno.ENOTDIR: ("a part of that path is a file, not a folder", "move the file away"),
    errno.EEXIST: ("there is a file where a folder is needed", "move the file away"),
    errno.EISDIR: ("there is a folder where a file is needed", "move the folder away"),
    errno.ENAMETOOLONG: ("the name is too long for this file system", "choose a shorter name"),
    errno.ELOOP: ("its symbolic links form a loop", "correct the links"),
}
"""Errors of a path that cannot be used, other than a full disk: errno -> (problem, remedy)."""


@contextlib.contextmanager
def file_errors_as_user_errors() -> Iterator[None]:
    """Convert an OSError of this block into a UserError if it means that a file cannot be written or used."""
    try:
        yield
    except OSError as error:
        if (user_error := user_error_for(error)) is None:
            raise
        raise user_error from None


def user_error_for(error: OSError) -> UserError | None:
    """Return the UserError for this error, or None if the error has another cause than an unusable file."""
    path = error.filename if isinstance(error.filename, str | os.PathLike) else None
    if error.errno in FULL:
        problem, remedy = FULL[error.errno]
        where = f" (writing {error.filename})" if error.filename else ""
        message = f"{problem}{where}: {remedy} and start again; a run resumes from its last checkpoint"
        return UserError(message, ExitCode.UNAVAILABLE)
    if error.errno not in BLOCKED or path is None:
        return None
    problem, remedy = BLOCKED[error.errno]
    ownership = f" ({owner(Path(path))})" if error.errno in RIGHTS else ""
    return UserError(f"{path} cannot be used: {problem}{ownership}. Choose another place, or {remedy}")


def usable_folder(folder: Path, *, key: str) -> None:
    """Create the folder if it is missing. Raises UserError, which names the key, if it cannot hold files."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable.{os.getpid()}.partial"
        probe.touch()
        probe.unlink()
    except OSError as error:
        if error.errno in FULL:
            raise
        problem, remedy = BLOCKED.get(error.errno or 0, (error.strerror or str(error), "correct that"))
        ownership = f" ({owner(folder)})" if error.errno in RIGHTS else ""
        raise UserError(
            f"{key}: cannot write to {folder}: {problem}{ownership}. Choose another place with "
            f"--{key}=FOLDER, or {remedy}"
        ) from None


def owner(path: Path) -> str:
    """Describe owner and mode of the nearest existing path at or above `path`, and the user of this process."""
    user = _current_user()
    for place in (path, *path.absolute().parents):
        with contextlib.suppress(OSError):
            status = place.stat()
            mode = stat.filemode(status.st_mode)
            return f"{place} belongs to {_user_name(status.st_uid)}, {mode}; this program runs as {user}"
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
