"""User errors made from OS errors of files."""

import errno
import os
from pathlib import Path

import pytest

from palimpsest.common.file_errors import file_errors_as_user_errors, usable_folder, user_error_for
from palimpsest.common.user_error import ExitCode, UserError

TABLE = [
    (errno.ENOSPC, ExitCode.UNAVAILABLE, "the disk is full (writing /there/x): free some space"),
    (errno.EDQUOT, ExitCode.UNAVAILABLE, "the disk quota is used up"),
    (errno.EFBIG, ExitCode.UNAVAILABLE, "a file reached the size limit (ulimit -f)"),
    (errno.EACCES, ExitCode.CONFIGURATION, "/there/x cannot be used: permission denied (/ belongs to root, drwx"),
    (
        errno.EPERM,
        ExitCode.CONFIGURATION,
        "/there/x cannot be used: the system does not permit it (/ belongs to root, drwx",
    ),
    (errno.EROFS, ExitCode.CONFIGURATION, "/there/x cannot be used: the file system is read-only. Choose another"),
    (errno.ENOTDIR, ExitCode.CONFIGURATION, "/there/x cannot be used: a part of that path is a file"),
    (errno.EEXIST, ExitCode.CONFIGURATION, "/there/x cannot be used: there is a file where a folder is needed"),
    (errno.EISDIR, ExitCode.CONFIGURATION, "/there/x cannot be used: there is a folder where a file is needed"),
    (errno.ENAMETOOLONG, ExitCode.CONFIGURATION, "/there/x cannot be used: the name is too long"),
    (errno.ELOOP, ExitCode.CONFIGURATION, "/there/x cannot be used: its symbolic links form a loop"),
]


@pytest.mark.parametrize(("number", "code", "text"), TABLE, ids=[errno.errorcode[row[0]] for row in TABLE])
def test_an_os_error_of_a_file_becomes_a_user_error(number: int, code: ExitCode, text: str) -> None:
    with pytest.raises(UserError) as error, file_errors_as_user_errors():
        raise OSError(number, os.strerror(number), "/there/x")
    assert error.value.code is code
    assert str(error.value).startswith(text)


@pytest.mark.parametrize("number", [errno.ENOENT, errno.ECONNREFUSED, errno.EPIPE, errno.EIO])
def test_other_os_errors_are_unchanged(number: int) -> None:
    assert user_error_for(OSError(number, os.strerror(number), "/there/x")) is None


def test_an_os_error_without_a_file_is_unchanged() -> None:
    assert user_error_for(PermissionError(errno.EACCES, "of a socket")) is None


def test_a_missing_folder_is_created(tmp_path: Path) -> None:
    usable_folder(tmp_path / "a" / "b", key="run.folder")
    assert (tmp_path / "a" / "b").is_dir()
    assert list((tmp_path / "a" / "b").iterdir()) == []


@pytest.mark.parametrize("place", ["a file/below", "a file", "/proc/palimpsest", "/sys/palimpsest", "/dev/null/below"])
def test_an_unusable_folder_is_reported_with_key_and_folder(tmp_path: Path, place: str) -> None:
    """Holds for root too: no user can create a folder there."""
    (tmp_path / "a file").touch()
    with pytest.raises(UserError) as error:
        usable_folder(tmp_path / place, key="run.folder")
    assert str(error.value).startswith(f"run.folder: cannot write to {tmp_path / place}: ")
    assert "--run.folder=FOLDER" in str(error.value)
    assert error.value.code is ExitCode.CONFIGURATION
