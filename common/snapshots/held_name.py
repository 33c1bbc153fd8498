"""The name of a worker or replica, held at the store while the process runs, so that no two have the same.

A process that is killed cannot free its name. Its successor on the same machine sees that the process has ended and
takes the name at once; one on another machine waits until the lease of the name is over.
"""

import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from palimpsest.common.boot_clock import boot_id
from palimpsest.common.proc_stat import stat_fields
from palimpsest.common.snapshots.client import SnapshotClient
from palimpsest.common.snapshots.retrying_http import StoreUnavailable
from palimpsest.common.user_error import ExitCode, UserError

RENEWAL_PATIENCE_S = 0.5
"""Time for which a renewal retries, in seconds; the next one follows soon."""
JOIN_S = 2.0
"""Time to wait for a renewal in progress at the end, in seconds."""
WAIT_S = 20.0
"""Time to wait for a name whose holder may have ended, in seconds. Longer than the store's lease of a name."""
LOOK_S = 1.0
"""Time between two attempts to take a name, in seconds."""
_START_TIME = 19
"""Index of the start time in the fields of /proc/PID/stat."""


class HeldName:
    """Holds a name inside its block, which a daemon thread renews.

    key: the configuration key of the name. on_lost: called in the thread with the error if another process took the
    name, because this one did not renew it for longer than the lease. pause: waits for a number of seconds and returns
    whether the process should stop; the block then begins without the name.
    """

    def __init__(
        self,
        store: SnapshotClient,
        role: str,
        name: str,
        *,
        key: str,
        on_lost: Callable[[UserError], object],
        pause: Callable[[float], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store, self._renewing = store, store.with_patience(RENEWAL_PATIENCE_S)
        self._role, self._name, self._key = role, name, key
        self._on_lost, self._pause, self._clock = on_lost, pause, clock
        self._instance = f"{_machine()} {os.getpid()} {_start_time(os.getpid())} {secrets.token_hex(8)}"
        self._holder = f"{socket.gethostname()}, process {os.getpid()}"
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="held name", daemon=True)
        self._lease_s = 0.0

    def __enter__(self) -> Self:
        """Take the name. Raises UserError if another process has it."""
        self._take()
        if self._lease_s:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._lease_s:
            self._thread.join(JOIN_S)
        if not self._thread.is_alive():  # else a renewal could follow and take the name again
            with suppress(StoreUnavailable, UserError):  # the lease ends anyway
                self._renewing.free_name(self._role, self._name, self._instance)
            self._renewing.close()

    def _take(self) -> None:
        deadline, seen, replaces = self._clock() + WAIT_S, None, ""
        while True:
            answer = self._request(self._store, replaces=replaces)
            if "lease_s" in answer:
                self._lease_s = float(answer["lease_s"])
                return
            if has_ended(answer["instance"]):
                replaces = answer["instance"]
                continue
            state = (answer["instance"], answer["renewals"])
            if (seen is not None and state != seen) or self._clock() >= deadline:
                raise UserError(
                    f"this run already has a {self._role} process named {self._name}: {answer['holder']}. Give this "
                    f"one another name with --{self._key}=NAME, or end the other",
                    ExitCode.CONFIGURATION,
                )
            seen = state
            if self._pause(LOOK_S):
                return

    def _renew(self) -> None:
        while not self._ended.wait(self._lease_s / 3):
            with suppress(StoreUnavailable, UserError):  # the next renewal may be answered
                answer = self._request(self._renewing)
                if "lease_s" not in answer and not self._ended.is_set():
                    self._on_lost(
                        UserError(
                            f"another process took the name {self._name} of this {self._role}: {answer['holder']}. "
                            f"This process did not renew it for longer than {self._lease_s:g} s",
                            ExitCode.REPLACED,
                        )
                    )
                    return

    def _request(self, store: SnapshotClient, *, replaces: str = "") -> dict[str, Any]:
        body = {"instance": self._instance, "holder": self._holder, "replaces": replaces}
        return store.take_name(self._role, self._name, body)


def has_ended(instance: str) -> bool:
    """Return whether the process that an instance names has ended; False if it is on another machine."""
    try:
        machine, pid, started, _ = instance.rsplit(" ", 3)
        return machine == _machine() and _start_time(int(pid)) != started
    except ValueError:  # of another release
        return False


def _machine() -> str:
    """Name what process ids belong to: the start of the machine and the PID namespace."""
    try:
        namespace = Path("/proc/self/ns/pid").readlink()
    except OSError:
        return secrets.token_hex(16)  # no process can be compared
    return f"{boot_id()}/{namespace}"


def _start_time(pid: int) -> str:
    """Return the start time of a process; empty if it has ended."""
    try:
        fields = stat_fields(Path(f"/proc/{pid}/stat").read_text(errors="replace"))
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[_START_TIME]
