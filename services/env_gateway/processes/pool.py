"""The gateway's side of the nursery: at most so many children at once, and a way to end each."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress

from pydantic import ValidationError

from palimpsest.services.env_gateway.environments.port import EnvironmentFailed
from palimpsest.services.env_gateway.hosts import AtCapacity
from palimpsest.services.env_gateway.processes.protocol import MAX_LINE, RUNNING, Described, EnvironmentSpec, Start

START_LIMIT_S = 120.0
DESCRIBE_LIMIT_S = 60.0
STOP_LIMIT_S = 5.0
BUSY_PAUSE_S = 0.02


class PooledChild:
    """One running child: its channel, and its leash."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, leash: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self._leash = leash
        self.exit_code: asyncio.Future[int | None] = asyncio.get_running_loop().create_future()
        """Done when it is gone; None if nobody is left who knows how it ended."""

    def kill(self) -> None:
        """End it, with what it started, whatever it does. Safe to call twice."""
        self.writer.transport.abort()
        if not self._leash.is_closing():
            self._leash.write_eof()


class Pool:
    """Children, forked from a nursery that is started when first needed and replaced if it dies."""

    def __init__(self, *, limit: int, wait_s: float, call_limit_s: float, modules: tuple[str, ...] = ()) -> None:
        """At most `limit` children; who finds none free waits for `wait_s`. `modules` are loaded beforehand."""
        self._modules = modules
        self._limit, self._wait_s = limit, wait_s
        self.call_limit_s = call_limit_s
        """A child that takes longer over one call has failed."""
        self._free = asyncio.Semaphore(limit)
        self._watches: set[asyncio.Task[None]] = set()
        self._nursery: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None

    def warm(self) -> None:
        """Start the nursery, if it does not run: its modules take a while to load."""
        if self._nursery is None or self._nursery.poll() is not None:
            self._stop_fork_server()
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                command = [
                    sys.executable,
                    "-m",
                    "palimpsest.services.env_gateway.processes.fork_server",
                    str(theirs.fileno()),
                ]
                self._nursery = subprocess.Popen(
                    [*command, str(os.getpid()), *self._modules],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    env=_child_environment(),
                )
            ours.setblocking(False)
            self._control = ours

    async def take(self, blueprint: EnvironmentSpec) -> PooledChild:
        """A new child; its place is free again when it is gone. Raises AtCapacity, EnvironmentFailed."""
        try:
            async with asyncio.timeout(self._wait_s):
                await self._free.acquire()
        except TimeoutError:
            raise AtCapacity(f"{self._limit} sessions have a process of their own already") from None
        try:
            child = await self._connect(*await self._asked_for(Start(blueprint=blueprint)))
        except BaseException as error:
            self._free.release()
            if isinstance(error, OSError):
                raise EnvironmentFailed("environment_crashed", f"no process could be started: {error}") from None
            raise
        try:  # from here on its place is freed by its end
            await self._wait_running(child)
        except BaseException:
            child.kill()
            raise
        return child

    def describe(self, blueprint: EnvironmentSpec) -> Described:
        """Have a child look at an environment's class. Blocks: for the time before sessions begin."""
        channel, leash = self._request_fork(Start(blueprint=blueprint, describe=True))
        with leash, channel, channel.makefile("rb") as said:
            channel.settimeout(DESCRIBE_LIMIT_S)
            try:
                return Described.model_validate_json(said.readline())
            except TimeoutError:
                return Described(problem=f"its import takes longer than {DESCRIBE_LIMIT_S:.0f} s")
            except ValidationError:
                return Described(problem="its import ended the process")

    async def close(self) -> None:
        """End every child and the nursery, and wait until they are gone."""
        self.stop()
        for watch in tuple(self._watches):
            await watch

    def stop(self) -> None:
        """End every child and the nursery. Safe to call twice."""
        self._stop_fork_server()
        if self._nursery is not None:
            try:
                self._nursery.wait(STOP_LIMIT_S)
            except subprocess.TimeoutExpired:  # it is still loading modules
                self._nursery.kill()
                self._nursery.wait()

    async def _asked_for(self, start: Start) -> tuple[socket.socket, socket.socket]:
        while True:
            try:
                return self._request_fork(start)
            except BlockingIOError:  # more waits in the socket than fits: the nursery is still loading modules
                await asyncio.sleep(BUSY_PAUSE_S)

    async def _connect(self, channel: socket.socket, leash: socket.socket) -> PooledChild:
        try:
            for end in (channel, leash):
                end.setblocking(False)
            reader, writer = await asyncio.open_unix_connection(sock=channel, limit=MAX_LINE)
            exits, leash_writer = await asyncio.open_unix_connection(sock=leash)
        except BaseException:  # given up: the end of its leash ends the child
            channel.close()
            leash.close()
            raise
        child = PooledChild(reader, writer, leash_writer)
        watch = asyncio.create_task(self._watch(child, exits, leash_writer))
        self._watches.add(watch)
        watch.add_done_callback(self._watches.discard)
        return child

    async def _wait_running(self, child: PooledChild) -> None:
        """Wait until the child runs, so that no call's deadline pays for the loading of modules."""
        try:
            async with asyncio.timeout(START_LIMIT_S):
                line = await child.reader.readline()
        except TimeoutError:
            raise EnvironmentFailed("environment_timeout", f"its process takes over {START_LIMIT_S:g} s") from None
        if line != RUNNING:
            raise EnvironmentFailed("environment_crashed", "its process ended before it began")

    def _request_fork(self, start: Start) -> tuple[socket.socket, socket.socket]:
        """Ask the nursery for a child; gives our ends of its channel and leash."""
        channel, its_channel = socket.socketpair()
        leash, its_leash = socket.socketpair()
        with its_channel, its_leash:
            try:
                self._send(start.model_dump_json().encode(), [its_channel.fileno(), its_leash.fileno()])
            except BaseException:
                channel.close()
                leash.close()
                raise
        return channel, leash

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
        """Hear of the child's end, and give its place to the next."""
        try:
            with suppress(OSError):
                code = await exits.read()
                child.exit_code.set_result(int(code) if code else None)
        finally:
            leash.transport.abort()
            if not child.exit_code.done():
                child.exit_code.set_result(None)
            self._free.release()

    def _stop_fork_server(self) -> None:
        if self._control is not None:
            self._control.close()
            self._control = None


def exit_text(exit_code: int | None) -> str:
    """An exit code in words."""
    if exit_code is None:
        return "its process is gone"
    if exit_code < 0:
        return f"its process was killed by {signal.Signals(-exit_code).name}"
    return f"its process ended with exit code {exit_code}"


def _child_environment() -> dict[str, str]:
    """The nursery's environment variables.

    Equal hashes make sets iterate alike in every gateway, so that a seed is the same task in all; one BLAS thread,
    because threads do not survive a fork.
    """
    return {
        **os.environ,
        "PYTHONHASHSEED": "0",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "PYTHONWARNINGS": "ignore::SyntaxWarning",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
