"""The gateway's side of the fork server: starts children up to a limit, and ends them."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
from contextlib import closing, suppress
from dataclasses import dataclass

from pydantic import ValidationError

from palimpsest.common.environments.port import EnvironmentFailed
from palimpsest.common.environments.sandbox.command import Tools
from palimpsest.common.orphans import kill_children
from palimpsest.common.secret_variables import of_environments
from palimpsest.common.sessions.hosts import AtCapacity
from palimpsest.services.env_gateway.processes.confinement import ChildLimits
from palimpsest.services.env_gateway.processes.protocol import MAX_LINE, RUNNING, Described, EnvironmentSpec, Start
from palimpsest.services.env_gateway.proxy.client import received
from palimpsest.services.env_gateway.proxy.server import HostProxy, ServedSocket

START_LIMIT_S = 120.0
DESCRIBE_LIMIT_S = 60.0
STOP_LIMIT_S = 5.0
EXCHANGE_LIMIT_S = 5.0
"""Time limit for the socket that a running child has sent already, in seconds."""
CLOSE_LIMIT_S = 5.0
"""Time limit for an environment that ends a session elsewhere, in seconds."""
BUSY_PAUSE_S = 0.02


@dataclass(frozen=True, slots=True)
class Ends:
    """The gateway's ends of a child's sockets."""

    channel: socket.socket
    leash: socket.socket
    handover: socket.socket | None = None
    """Over which a child with permitted hosts gives its listening socket."""

    def close(self) -> None:
        """Close all."""
        for end in (self.channel, self.leash, self.handover):
            if end is not None:
                end.close()


class PooledChild:
    """A running child with its channel and its leash."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, leash: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self._leash, self._ending = leash, False
        self.exit_code: asyncio.Future[int | None] = asyncio.get_running_loop().create_future()
        """Done when the child is gone; None if its exit code is unknown."""

    def kill(self) -> None:
        """Kill the child with its processes. Idempotent."""
        self.writer.transport.abort()
        if not self._leash.is_closing():
            self._leash.write_eof()

    def end(self) -> None:
        """Let the child close its environment, and kill it after CLOSE_LIMIT_S. Idempotent."""
        if self.exit_code.done() or self.writer.transport.is_closing() or self._ending:
            return
        self._ending = True
        self.writer.write_eof()
        asyncio.get_running_loop().call_later(CLOSE_LIMIT_S, self.kill)

    @property
    def ending(self) -> bool:
        """Whether the child is closing its environment."""
        return self._ending and not self.exit_code.done()


class Pool:
    """Children of a fork server, which starts when first needed and is replaced if it dies."""

    def __init__(
        self,
        *,
        limit: int,
        wait_s: float,
        call_limit_s: float,
        modules: tuple[str, ...] = (),
        variables: tuple[str, ...] = (),
        adopts: bool = False,
        limits: ChildLimits | None = None,
        code_tools: Tools | None = None,
    ) -> None:
        """Allow `limit` children; a request waits `wait_s` seconds for a free place. `modules` are preloaded.

        `variables`: names of additional environment variables that the children receive. `adopts`: this process adopts
        orphans and has no children but this pool's, so it kills what a dead fork server leaves behind. `limits`: of
        each child; None: no limits. `code_tools`: of the sandbox in which tools run programs; None: they run none.
        """
        self._modules, self._variables, self._adopts, self._limits = modules, variables, adopts, limits
        self._limit, self._wait_s, self._code_tools = limit, wait_s, code_tools
        self.call_limit_s = call_limit_s
        """Time limit of one call of a child, in seconds."""
        self._free = asyncio.Semaphore(limit)
        self._watches: set[asyncio.Task[None]] = set()
        self._children: set[PooledChild] = set()
        self._proxy = HostProxy()
        self._fork_server: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None

    def warm(self) -> None:
        """Start the fork server if it is not running; its modules take seconds to load."""
        if self._fork_server is None or self._fork_server.poll() is not None:
            self._stop_fork_server()
            self._kill_orphans()
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                command = [
                    sys.executable,
                    "-m",
                    "palimpsest.services.env_gateway.processes.fork_server",
                    str(theirs.fileno()),
                ]
                self._fork_server = subprocess.Popen(
                    [*command, str(os.getpid()), *self._modules],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    env=_child_environment(self._variables),
                )
            ours.setblocking(False)
            self._control = ours

    async def take(self, blueprint: EnvironmentSpec) -> PooledChild:
        """Start a child; its place is free again when it is gone. Raises AtCapacity, EnvironmentFailed."""
        try:
            async with asyncio.timeout(self._wait_s):
                await self._free.acquire()
        except TimeoutError:
            raise AtCapacity(f"{self._limit} sessions already have their own process") from None
        try:
            ends = await self._request_when_ready(self._start(blueprint))
            child = await self._connect(ends)
        except BaseException as error:
            self._free.release()
            if isinstance(error, OSError):
                raise EnvironmentFailed("environment_crashed", f"no process could be started: {error}") from None
            raise
        try:  # from here on, the end of the child frees its place
            await self._wait_running(child)
            if served := self._serve_hosts(blueprint, ends.handover, EXCHANGE_LIMIT_S):
                child.exit_code.add_done_callback(lambda _: served.close())
        except OSError as error:
            child.kill()
            raise EnvironmentFailed("environment_crashed", f"its process has no proxy: {error}") from None
        except BaseException:
            child.kill()
            raise
        finally:
            if ends.handover is not None:
                ends.handover.close()
        return child

    def describe(self, blueprint: EnvironmentSpec) -> Described:
        """Check an environment's class in a child. Blocks; call it before sessions begin."""
        ends = self._request_fork(self._start(blueprint, describe=True))
        served: ServedSocket | None = None
        with closing(ends), ends.channel.makefile("rb") as answers:
            ends.channel.settimeout(DESCRIBE_LIMIT_S)
            try:
                served = self._serve_hosts(blueprint, ends.handover, DESCRIBE_LIMIT_S)
                return Described.model_validate_json(answers.readline())
            except TimeoutError:
                return Described(problem=f"its import takes longer than {DESCRIBE_LIMIT_S:.0f} s")
            except (ValidationError, ConnectionResetError):
                return Described(problem="its import ended the process")
            finally:
                if served is not None:
                    served.close()

    async def close(self) -> None:
        """End every child and the fork server, and wait until they are gone."""
        if closing := [child.exit_code for child in self._children if child.ending]:
            await asyncio.wait(closing, timeout=CLOSE_LIMIT_S)
        self.stop()
        for watch in tuple(self._watches):
            await watch

    def stop(self) -> None:
        """End every child and the fork server. Idempotent."""
        self._stop_fork_server()
        self._proxy.stop()
        if self._fork_server is not None:
            try:
                self._fork_server.wait(STOP_LIMIT_S)
            except subprocess.TimeoutExpired:  # it may still be loading modules
                self._fork_server.kill()
                self._fork_server.wait()

    def _start(self, blueprint: EnvironmentSpec, *, describe: bool = False) -> Start:
        return Start(blueprint=blueprint, describe=describe, limits=self._limits, code_tools=self._code_tools)

    def _serve_hosts(
        self, blueprint: EnvironmentSpec, handover: socket.socket | None, limit_s: float
    ) -> ServedSocket | None:
        """Serve the socket that the child gives, if it has one. Raises OSError."""
        if handover is None or blueprint.hosts is None:
            return None
        handover.settimeout(limit_s)
        return self._proxy.serve(received(handover), blueprint.hosts)

    async def _request_when_ready(self, start: Start) -> Ends:
        while True:
            try:
                return self._request_fork(start)
            except BlockingIOError:  # the socket's buffer is full, because the fork server is loading modules
                await asyncio.sleep(BUSY_PAUSE_S)

    async def _connect(self, ends: Ends) -> PooledChild:
        try:
            for end in (ends.channel, ends.leash):
                end.setblocking(False)
            reader, writer = await asyncio.open_unix_connection(sock=ends.channel, limit=MAX_LINE)
            exits, leash_writer = await asyncio.open_unix_connection(sock=ends.leash)
        except BaseException:  # the end of its leash ends the child
            ends.close()
            raise
        child = PooledChild(reader, writer, leash_writer)
        watch = asyncio.create_task(self._watch(child, exits, leash_writer))
        self._watches.add(watch)
        self._children.add(child)
        watch.add_done_callback(lambda _: self._children.discard(child))
        watch.add_done_callback(self._watches.discard)
        return child

    async def _wait_running(self, child: PooledChild) -> None:
        """Wait until the child runs, so that the deadline of a call does not include the loading of modules."""
        try:
            async with asyncio.timeout(START_LIMIT_S):
                line = await child.reader.readline()
        except TimeoutError:
            raise EnvironmentFailed("environment_timeout", f"its process takes over {START_LIMIT_S:g} s") from None
        if line != RUNNING:
            raise EnvironmentFailed("environment_crashed", "its process ended before it began")

    def _request_fork(self, start: Start) -> Ends:
        """Request a child from the fork server. Return this side's ends of its sockets."""
        confined = start.limits is not None and start.limits.isolate
        pairs = [socket.socketpair() for _ in range(3 if start.blueprint.hosts is not None and confined else 2)]
        ends = Ends(*(ours for ours, _ in pairs))
        try:
            self._send(start.model_dump_json().encode(), [theirs.fileno() for _, theirs in pairs])
        except BaseException:
            ends.close()
            raise
        finally:
            for _, theirs in pairs:
                theirs.close()
        return ends

    def _send(self, message: bytes, descriptors: list[int]) -> None:
        self.warm()
        assert self._control is not None
        try:
            socket.send_fds(self._control, [message], descriptors)
        except (BrokenPipeError, ConnectionResetError):  # it has just died
            self.stop()
            self.warm()
            socket.send_fds(self._control, [message], descriptors)

    async def _watch(self, child: PooledChild, exits: asyncio.StreamReader, leash: asyncio.StreamWriter) -> None:
        """Wait for the child's end, then free its place."""
        try:
            with suppress(OSError):
                code = await exits.read()
                child.exit_code.set_result(int(code) if code else None)
        finally:
            leash.transport.abort()
            if not child.exit_code.done():
                child.exit_code.set_result(None)
            self._free.release()
            if self._adopts and child.exit_code.result() is None:
                await self._end_orphans()

    async def _end_orphans(self) -> None:
        """Kill what the fork server left behind, if it died. Its sockets close shortly before its end."""
        for _ in range(int(STOP_LIMIT_S / BUSY_PAUSE_S)):
            if self._fork_server is None or self._fork_server.poll() is not None:
                break
            await asyncio.sleep(BUSY_PAUSE_S)
        self._kill_orphans()

    def _kill_orphans(self) -> None:
        """Kill the sessions' processes that a dead fork server left behind."""
        if self._adopts and self._fork_server is not None and self._fork_server.poll() is not None:
            kill_children()

    def _stop_fork_server(self) -> None:
        if self._control is not None:
            self._control.close()
            self._control = None


def exit_text(exit_code: int | None) -> str:
    """Describe an exit code."""
    if exit_code is None:
        return "its process is gone"
    if exit_code < 0:
        return f"its process was killed by {signal.Signals(-exit_code).name}"
    return f"its process ended with exit code {exit_code}"


def _child_environment(named: tuple[str, ...]) -> dict[str, str]:
    """Return the fork server's environment variables.

    Environments are third-party code, so none of the gateway's secrets is among them. A fixed hash seed gives sets the
    same order in every gateway, so that a seed is the same task. One BLAS thread, because threads do not survive a
    fork.
    """
    return {
        **of_environments(os.environ, named=named),
        "PYTHONHASHSEED": "0",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "PYTHONWARNINGS": "ignore::SyntaxWarning",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
