"""The limits of a session's process: memory, processes, files, its user, the network (Linux).

Limits of memory and files need no privilege. The others need one of two things, which `available` finds out:

- root: the process gets a network namespace, and with `user` a user id of its own, by which the kernel counts
  processes.
- another user: a user namespace, which many containers do not permit. Inside, the process has the same user id.

A process that keeps the id 0 could leave its network namespace and kill the gateway. So root needs `user`.
"""

import ctypes
import fcntl
import os
import resource
import socket
import struct
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from palimpsest.common.sessions.wire import Wire

USERS = 1000
"""Number of user ids from `user` on; sessions take them in turn."""
MOST_LIKELY = "1000"
"""Score with which the kernel ends a session before the gateway and other services if memory runs out."""
_PR_SET_NO_NEW_PRIVS = 38
_NEW_USER, _NEW_NET = 0x10000000, 0x40000000
_SET_FLAGS, _UP = 0x8914, 0x1
"""SIOCSIFFLAGS, IFF_UP."""
_libc = ctypes.CDLL(None, use_errno=True)
"""Loaded at import, because loading a library after a fork is not safe."""


class ChildLimits(Wire):
    """Limits of each session's processes."""

    memory_mib: int
    """Address space of one process."""
    processes: int | None
    """Processes and threads of a session; None where the machine cannot limit them."""
    files: int
    """Open files and sockets of one process."""
    file_mib: int
    """Size of one file."""
    user: int | None = None
    """First user id of the sessions; None: the gateway's."""
    isolate: bool = False
    """Whether a session without permission for the network gets none."""


@dataclass(frozen=True, slots=True)
class Available:
    """What this machine can enforce for this process."""

    network: bool
    """Whether a session's processes can be without a network."""
    processes: bool
    """Whether the number of a session's processes can be limited."""
    problem: str = ""
    """Why something is missing."""


def available(user: int | None) -> Available:
    """Try the namespaces in a child process. user: see ChildLimits."""
    pid = os.fork()
    if pid == 0:
        try:
            _enter_namespaces(network=False)
            os._exit(0)
        except OSError as error:
            os._exit(min(error.errno or 1, 127))
        except BaseException:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    root = os.geteuid() == 0
    problem = "" if code == 0 else f"no namespace can be made: {os.strerror(code) if code > 0 else 'killed'}"
    if root and user is None:
        problem = problem or "the gateway runs as root and env_gateway.child_user is not set"
    return Available(network=code == 0, processes=user is not None if root else code == 0, problem=problem)


def confine(limits: ChildLimits, *, network: bool, number: int) -> None:
    """Confine this process and its later children. Raises OSError.

    network: whether it may use the network. number: of the session, from which its user id follows.
    """
    with suppress(OSError):  # where /proc is read-only
        Path("/proc/self/oom_score_adj").write_text(MOST_LIKELY)
    if limits.isolate:
        _enter_namespaces(network=network)
    if limits.user is not None:
        identity = limits.user + number % USERS
        os.setgroups([])
        os.setresgid(identity, identity, identity)
        os.setresuid(identity, identity, identity)
    megabyte = 2**20
    wanted = {
        resource.RLIMIT_AS: limits.memory_mib * megabyte,
        resource.RLIMIT_NOFILE: limits.files,
        resource.RLIMIT_FSIZE: limits.file_mib * megabyte,
        resource.RLIMIT_CORE: 0,
    }
    if limits.processes is not None:
        wanted[resource.RLIMIT_NPROC] = limits.processes
    for kind, most in wanted.items():
        ceiling = resource.getrlimit(kind)[1]
        allowed = most if ceiling == resource.RLIM_INFINITY else min(most, ceiling)
        resource.setrlimit(kind, (allowed, allowed))
    if _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "no_new_privs")


def _enter_namespaces(*, network: bool) -> None:
    """Leave the network (unless `network`), and enter a user namespace if this process is not root."""
    root, user, group = os.geteuid() == 0, os.geteuid(), os.getegid()
    kinds = (0 if root else _NEW_USER) | (0 if network else _NEW_NET)
    if not kinds:
        return
    if _libc.unshare(kinds):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    if not root:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    if not network:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:  # programs may talk to themselves
            fcntl.ioctl(any_socket, _SET_FLAGS, struct.pack("16sH14s", b"lo", _UP, b""))
