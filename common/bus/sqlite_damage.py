"""Recognizes a file of SQLite that something else changed or cut off."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from palimpsest.common.user_error import ExitCode, UserError

_HEADER = b"SQLite format 3\0"
_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def refuse_other_file(path: Path) -> None:
    """Raise UserError if the file is not one of SQLite, which would make a new log of an empty or very short one."""
    with path.open("rb") as file:
        if file.read(len(_HEADER)) != _HEADER:
            raise _damage(str(path), "it is no SQLite file")


@contextmanager
def damage_as_user_error(log: str) -> Iterator[None]:
    """Convert the errors of a damaged file, which name no file, into UserError."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        if getattr(error, "sqlite_errorcode", 0) & 0xFF not in _DAMAGED:
            raise
        raise _damage(log, str(error)) from None


def _damage(log: str, problem: str) -> UserError:
    return UserError(f"{log}: the log is damaged: {problem}. Restore the file from a copy", ExitCode.DAMAGED)
