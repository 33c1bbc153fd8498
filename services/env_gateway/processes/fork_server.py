"""python -m palimpsest.services.env_gateway.processes.fork_server CONTROL PARENT [MODULE ...]

Loads the modules, then forks a child for every Start message on the control socket. When a leash ends, the server kills
its child. When a child exits, the server sends its exit code over the leash. The server exits when the control socket
ends.

No process of a session outlives the session, not even one that called setsid. A child adopts the orphans below it, so
while it lives, its processes are below it. When it ends, they become children of the server, which kills every child
that is not a session's.
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

from palimpsest.common.environments.sandbox.program import permit
from palimpsest.common.orphans import adopt_orphans, children, kill, kill_children
from palimpsest.common.parent_death import die_with_parent, survive_parent
from palimpsest.services.env_gateway.processes import child
from palimpsest.services.env_gateway.processes.confinement import confine
from palimpsest.services.env_gateway.processes.protocol import Start
from palimpsest.services.env_gateway.proxy.client import use_proxy

MAX_START = 65536


class ForkServer:
    """Forks children and kills them when their leashes end."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._leashes: dict[int, socket.socket] = {}
        self._started = 0
        self._helpers = children()
        """Processes that a preloaded module started."""
        adopt_orphans()
        self._wake, waker = socket.socketpair()
        for end in (self._wake, waker):
            end.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # a handler is needed for set_wakeup_fd
        signal.set_wakeup_fd(waker.fileno())
        self._waker = waker
        self._selector = selectors.DefaultSelector()
        self._selector.register(control, selectors.EVENT_READ)
        self._selector.register(self._wake, selectors.EVENT_READ)

    def run(self) -> None:
        """Serve until the control socket ends, then kill every process."""
        try:
            self._listen()
        finally:
            signal.set_wakeup_fd(-1)
            kill_children()

    def _listen(self) -> None:
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is self._control:
                    message, descriptors, _, _ = socket.recv_fds(self._control, MAX_START, 3)
                    if not message:
                        return
                    self._start(Start.model_validate_json(message), *map(_socket, descriptors))
                elif key.fileobj is self._wake:
                    self._wake.recv(4096)
                    self._collect()
                else:
                    self._on_leash_closed(key.data)

    def _start(self, start: Start, channel: socket.socket, leash: socket.socket, *handover: socket.socket) -> None:
        self._started += 1
        parent, pid = os.getpid(), os.fork()
        if pid == 0:
            self._run_child(start, channel, leash, parent, *handover)
        for given in (channel, *handover):
            given.close()
        self._leashes[pid] = leash
        self._selector.register(leash, selectors.EVENT_READ, pid)

    def _run_child(
        self, start: Start, channel: socket.socket, leash: socket.socket, parent: int, *handover: socket.socket
    ) -> None:
        """Run the child's program and exit; never returns."""
        code = 1
        try:
            die_with_parent(parent)
            adopt_orphans()
            os.setsid()  # signals to its own group, for example of a tool that ends itself, reach only this session
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            self._selector.close()
            for inherited in (self._control, self._wake, self._waker, leash, *self._leashes.values()):
                inherited.close()
            if start.limits is not None:
                confine(start.limits, network=start.blueprint.network, number=self._started)
                die_with_parent(parent)  # a change of the user undoes it
            for socket_of_hosts in handover:
                use_proxy(socket_of_hosts)
            permit(start.code_tools)
            (child.describe if start.describe else child.serve)(start.blueprint, channel)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)

    def _on_leash_closed(self, pid: int) -> None:
        if pid in self._leashes:  # else it was collected meanwhile
            self._selector.unregister(self._leashes[pid])
            kill(pid)

    def _collect(self) -> None:
        """Collect exited children, send the exit codes of sessions, and kill the processes that they left behind."""
        with contextlib.suppress(ChildProcessError):  # no child is left
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                pid, status = ended
                self._helpers.discard(pid)
                if leash := self._leashes.pop(pid, None):
                    self._end_leash(leash, status)
            for orphan in children() - self._helpers - set(self._leashes):
                kill(orphan)  # its end calls this method again, for what it left behind

    def _end_leash(self, leash: socket.socket, status: int) -> None:
        with contextlib.suppress(KeyError):  # its other end is closed
            self._selector.unregister(leash)
        with contextlib.suppress(OSError):  # its other end is closed
            leash.sendall(str(os.waitstatus_to_exitcode(status)).encode())
        leash.close()


def main(control: int, parent: int, modules: list[str]) -> None:
    """Run until the gateway closes the control socket or dies."""
    die_with_parent(parent)
    os.setsid()  # no signals from the terminal
    for module in modules:
        with contextlib.suppress(BaseException):  # a child that needs the module reports the error
            importlib.import_module(module)
    survive_parent()  # from here on, the end of the control socket stops the server, after it has killed the children
    gc.freeze()  # children share these pages until they write to them
    ForkServer(_socket(control)).run()


def _socket(descriptor: int) -> socket.socket:
    found = socket.socket(fileno=descriptor)
    found.set_inheritable(False)
    return found


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
