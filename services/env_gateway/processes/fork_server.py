"""python -m palimpsest.services.env_gateway.processes.fork_server CONTROL PARENT [MODULE ...]

Loads the modules, then forks a child for every Start that comes over the control socket. A child is killed, with what
it started, when its leash ends; when it has ended, its exit code goes up the leash. All ends with the control socket.
"""

import contextlib
import gc
import importlib
import os
import selectors
import signal
import socket
import sys
import traceback

from palimpsest.common.parent_death import die_with_parent, survive_parent
from palimpsest.services.env_gateway.processes import child
from palimpsest.services.env_gateway.processes.protocol import Start

MAX_START = 65536


class ForkServer:
    """The children that live, by process id, each with its leash."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._leashes: dict[int, socket.socket] = {}
        self._wake, waker = socket.socketpair()
        for end in (self._wake, waker):
            end.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # so that the descriptor below hears of it
        signal.set_wakeup_fd(waker.fileno())
        self._waker = waker
        self._selector = selectors.DefaultSelector()
        self._selector.register(control, selectors.EVENT_READ)
        self._selector.register(self._wake, selectors.EVENT_READ)

    def run(self) -> None:
        """Until the control socket ends; then every child is killed."""
        try:
            self._listen()
        finally:
            signal.set_wakeup_fd(-1)
            for pid in self._leashes:
                self._kill(pid)

    def _listen(self) -> None:
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is self._control:
                    message, descriptors, _, _ = socket.recv_fds(self._control, MAX_START, 2)
                    if not message:
                        return
                    self._start(Start.model_validate_json(message), *map(_socket, descriptors))
                elif key.fileobj is self._wake:
                    self._wake.recv(4096)
                    self._collect()
                else:
                    self._on_leash_closed(key.data)

    def _start(self, start: Start, channel: socket.socket, leash: socket.socket) -> None:
        parent, pid = os.getpid(), os.fork()
        if pid == 0:
            self._run_child(start, channel, leash, parent)
        channel.close()
        self._leashes[pid] = leash
        self._selector.register(leash, selectors.EVENT_READ, pid)

    def _run_child(self, start: Start, channel: socket.socket, leash: socket.socket, parent: int) -> None:
        """Never returns."""
        code = 1
        try:
            die_with_parent(parent)
            os.setsid()  # a process group, to be killed as one
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            self._selector.close()
            for inherited in (self._control, self._wake, self._waker, leash, *self._leashes.values()):
                inherited.close()
            (child.describe if start.describe else child.serve)(start.blueprint, channel)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)

    def _on_leash_closed(self, pid: int) -> None:
        if pid in self._leashes:  # else it was collected a moment ago
            self._selector.unregister(self._leashes[pid])
            self._kill(pid)

    def _kill(self, pid: int) -> None:
        """Kill a child and what it started. It is not collected yet, so its id is still its own."""
        with contextlib.suppress(ProcessLookupError):  # not a group yet
            os.killpg(pid, signal.SIGKILL)
        os.kill(pid, signal.SIGKILL)

    def _collect(self) -> None:
        """Pass on how children ended."""
        while self._leashes:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended is None:
                return
            self._kill(ended.si_pid)  # it is dead, what it started may not be
            _, status = os.waitpid(ended.si_pid, 0)
            leash = self._leashes.pop(ended.si_pid)
            with contextlib.suppress(KeyError):  # its leash had ended
                self._selector.unregister(leash)
            with contextlib.suppress(OSError):  # nobody listens any more
                leash.sendall(str(os.waitstatus_to_exitcode(status)).encode())
            leash.close()


def main(control: int, parent: int, modules: list[str]) -> None:
    """Run until the gateway closes the control socket, or dies."""
    die_with_parent(parent)
    os.setsid()  # out of the terminal's reach
    for module in modules:
        with contextlib.suppress(BaseException):  # the child that needs it reports it; the others go on
            importlib.import_module(module)
    survive_parent()  # from here on the control socket tells, and leaves time to kill the children
    gc.freeze()  # children share these pages until they write to them
    ForkServer(_socket(control)).run()


def _socket(descriptor: int) -> socket.socket:
    found = socket.socket(fileno=descriptor)
    found.set_inheritable(False)
    return found


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
