"""A lock on a file in the run's folder, so that a run has one supervisor at a time.

The kernel holds the lock, not the file: it is free as soon as the supervisor exits, however it ends. The content of the
file is only for the error message of a second supervisor.
"""

import errno
import fcntl
import getpass
import json
import os
import socket
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from palimpsest.common import run_folder
from palimpsest.common.user_error import ExitCode, UserError

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""Error numbers of file systems without locks."""


class RunLock:
    """Locks the run in this folder until the end of the process or of the `with` block.

    Raises UserError if another supervisor holds the lock.
    """

    def __init__(self, home: Path, *, now: datetime) -> None:
        self._path = home / run_folder.LOCK
        self.warning: str | None = None
        """A warning for the terminal, or None."""
        self._handle = _open_lock_file(self._path)
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _read_holder(self._path)
            os.close(self._handle)
            raise UserError(_lock_error(home, holder), ExitCode.UNAVAILABLE) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            self.warning = f"{self._path}: this file system has no locks; do not start a second supervisor for this run"
        self._write_holder(now)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._handle)

    def _write_holder(self, now: datetime) -> None:
        """Write the holder into the file, unless the file belongs to another user."""
        holder = {
            "pid": os.getpid(),
            "user": _user(),
            "host": socket.gethostname(),
            "since": now.isoformat(sep=" ", timespec="seconds"),
        }
        if fcntl.fcntl(self._handle, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY:
            os.ftruncate(self._handle, 0)
            os.pwrite(self._handle, json.dumps(holder).encode() + b"\n", 0)


def _open_lock_file(path: Path) -> int:
    """Open the lock file. Child processes do not inherit it, so a surviving service does not hold the lock."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except PermissionError:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)  # another user's file: read access suffices to test the lock


def _read_holder(path: Path) -> dict[str, Any]:
    try:
        holder = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _lock_error(home: Path, holder: dict[str, Any]) -> str:
    who = "another process"
    if {"pid", "user", "host", "since"} <= holder.keys():
        who = f"process {holder['pid']} of {holder['user']} on {holder['host']} (since {holder['since']})"
    return (
        f"the run in {home} is active: {who} supervises it. Wait until it ends, or stop it (Ctrl-C in its terminal, or "
        f"`kill {holder.get('pid', 'PID')}`); `palimpsest report {home}` and `audit` work on an active run. For a "
        f"separate run, choose another --run.id"
    )


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return f"user {os.getuid()}"
