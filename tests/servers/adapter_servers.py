"""Servers of other projects for the tests of the adapters, each in an environment of its own in the cache."""

import os
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx
import psutil
import pytest

from tests.processes.waiting import LIMIT_S
from tools.backends.checkouts import Checkout, NoCheckout
from tools.backends.packages import NoPython, interpreter
from tools.backends.ports import free

PROGRAMS = Path(__file__).parents[1] / "contract" / "adapters"


class McpServer:
    """The server processes that the sessions of an MCP adapter started."""

    def __init__(self, _folder: Path) -> None:
        self._program = str(PROGRAMS / "sums_mcp.py")

    def processes(self) -> list[psutil.Process]:
        """Return those below this process."""
        below = psutil.Process().children(recursive=True)
        return [one for one in below if one.is_running() and self._program in _command(one)]

    def kill(self) -> None:
        """Kill them."""
        for process in self.processes():
            process.kill()

    def count(self) -> int:
        """Return how many there are."""
        return len(self.processes())


class ProgramServer:
    """A program of tests/contract/adapters that answers /sums/sessions_count."""

    requirement = program = ""
    least = (3, 11)

    def __init__(self, folder: Path) -> None:
        self._log = folder / "server.log"

    def __enter__(self) -> Self:
        port = free()
        self.url = f"http://127.0.0.1:{port}"
        command = [self.python(), str(PROGRAMS / self.program), str(port)]
        environment = {**os.environ, "OPENREWARD_DISABLE_UPDATE_CHECK": "1"}
        with self._log.open("w") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        deadline = time.monotonic() + LIMIT_S
        while time.monotonic() < deadline:
            assert self._process.poll() is None, self._log.read_text()
            try:
                if self.count() == 0:
                    return self
            except httpx.TransportError:
                time.sleep(0.05)
        raise AssertionError(self._log.read_text())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def python(self) -> str:
        """Return the interpreter of the server. Skips the test if the machine has none."""
        try:
            return str(interpreter(self.requirement, least=self.least))
        except NoPython as error:
            pytest.skip(f"not run: {error}")

    def kill(self) -> None:
        """Kill the server."""
        self._process.kill()
        self._process.wait()

    def count(self) -> int:
        """Return the number of sessions that the server holds."""
        return int(httpx.get(f"{self.url}/sums/sessions_count", timeout=LIMIT_S).json())


class McpHttpServer(ProgramServer):
    """An MCP server over HTTP, which all sessions share. `mcp` is in this environment."""

    program = "sums_mcp_http.py"

    def python(self) -> str:
        """Return this interpreter."""
        return sys.executable


class OrsServer(ProgramServer):
    """A server of the Open Reward Standard."""

    requirement, program = "openreward==0.1.167", "sums_ors.py"


class OpenEnvServer(ProgramServer):
    """A server of OpenEnv."""

    requirement, program = "openenv==0.10.0", "sums_openenv.py"


class NemoGymServer(ProgramServer):
    """A resources server of NeMo Gym. It has no request that ends a session, so it holds none that should end."""

    requirement, program, least = "nemo-gym==0.4.0", "sums_nemo_gym.py", (3, 12)

    def count(self) -> int:
        """Return 0 when the server answers."""
        httpx.get(f"{self.url}/openapi.json").raise_for_status()
        return 0


def folder_of(checkout: Checkout) -> Path:
    """Return the checkout in the cache. Skips the test if there is none, because it is not published."""
    try:
        return checkout.folder()
    except NoCheckout as error:
        pytest.skip(f"not run: {error}")


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []
