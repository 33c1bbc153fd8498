"""A run has one supervisor at a time: a lock on a file in its folder, held as long as the supervisor lives.

The kernel holds the lock, not the file: however the supervisor dies, the lock is free at once. What stands in the file
is only for the sentence that a second supervisor is refused with.
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
"""What a file system says that has no locks."""


class RunLock:
    """The run in this folder is ours from here to the end of the process, or of the `with` block.

    Raises UserError when another supervisor has it.
    """

    def __init__(self, home: Path, *, now: datetime) -> None:
        self._path = home / run_folder.LOCK
        self.warning: str | None = None
        """What a person has to know of it."""
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
            self.warning = f"{self._path}: this file system has no locks, so nothing keeps a second supervisor out"
        self._write_holder(now)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._handle)

    def _write_holder(self, now: datetime) -> None:
        """Write down who holds it; a file of another user's stays as it is."""
        said = {
            "pid": os.getpid(),
            "user": _user(),
            "host": socket.gethostname(),
            "since": now.isoformat(sep=" ", timespec="seconds"),
        }
        if fcntl.fcntl(self._handle, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY:
            os.ftruncate(self._handle, 0)
            os.pwrite(self._handle, json.dumps(said).encode() + b"\n", 0)


def _open_lock_file(path: Path) -> int:
    """Never inherited by a child: a service that outlives its supervisor does not hold the run."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except PermissionError:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)  # another user's: enough to see whether it is held


def _read_holder(path: Path) -> dict[str, Any]:
    try:
        said = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return said if isinstance(said, dict) else {}


def _lock_error(home: Path, holder: dict[str, Any]) -> str:
    who = "another process"
    if {"pid", "user", "host", "since"} <= holder.keys():
        who = f"process {holder['pid']} of {holder['user']} on {holder['host']} (since {holder['since']})"
    return (
        f"the run in {home} is alive: {who} supervises it. Let it go on, or stop it first (Ctrl-C in its terminal, or "
        f"`kill {holder.get('pid', 'PID')}`); `palimpsest report {home}` and `audit` work beside it. For a run "
        f"of its own choose another --run.id"
    )


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return f"user {os.getuid()}"
