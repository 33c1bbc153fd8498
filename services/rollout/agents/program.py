"""Starts the program of an agent for one session, and ends it with everything that it started in its process group."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial

from palimpsest.common.parent_death import die_with_parent
from palimpsest.common.secret_variables import of_environments

LAST_BYTES = 2000
"""Size of the end of the program's output that an error text quotes."""
END_S = 5.0
"""Time for a program to end by itself once its session has ended, in seconds."""


class Program:
    """A running program."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._tail = b""
        self._reading = asyncio.create_task(self._read())

    async def wait(self) -> int:
        """Return the exit code; negative for a signal."""
        return await self._process.wait()

    async def end(self, *, grace_s: float) -> None:
        """Kill the process group, after a time in which the program may end by itself."""
        if grace_s and self._process.returncode is None:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), grace_s)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        await self._process.wait()
        self._reading.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)

    @property
    def last_output(self) -> str:
        """The end of its output."""
        return self._tail.decode(errors="replace").strip()

    async def _read(self) -> None:
        """Read the output, so that the program never waits for a reader."""
        assert self._process.stdout is not None
        while chunk := await self._process.stdout.read(65536):
            self._tail = (self._tail + chunk)[-LAST_BYTES:]


@asynccontextmanager
async def running(
    command: Sequence[str], variables: Mapping[str, str], *, named: Sequence[str] = ()
) -> AsyncIterator[Program]:
    """Run the program inside the block; it is killed at the end.

    It receives the usual variables (common/secret_variables.py), the `named` ones, and `variables`. Raises OSError.
    """
    process = await asyncio.create_subprocess_exec(
        *command,
        env={**of_environments(os.environ, named=named), **variables},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=partial(die_with_parent, os.getpid()),
    )
    program = Program(process)
    try:
        yield program
    finally:
        await program.end(grace_s=0.0)
