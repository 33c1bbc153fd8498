"""Servers of other projects for the tests of the adapters, each in an environment of its own in the cache."""

import os
import shutil
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
from tests.unit.env_gateway.running import free_port
from tools.backends import cache

PROGRAMS = Path(__file__).parents[1] / "contract" / "adapters"
UV = str(Path(sys.executable).with_name("uv"))


def library(requirement: str, *others: str) -> Path:
    """Return a folder for sys.path with this package and what it needs, or with `others` if they are given."""

    def install(folder: Path) -> None:
        packages = others or (requirement,)
        subprocess.run([UV, "pip", "install", "--quiet", "--target", str(folder), *packages], check=True)

    version = f"{sys.version_info.major}{sys.version_info.minor}"
    return cache.made(f"library-{version}-{requirement.replace('==', '-')}", install, print)


def interpreter(requirement: str, *, least: tuple[int, int] = (3, 11)) -> Path:
    """Return the Python of an environment with this package. least: version of Python that the package needs."""
    base = _python(least)

    def install(folder: Path) -> None:
        subprocess.run([UV, "venv", "--quiet", "--clear", "--relocatable", "--python", base, str(folder)], check=True)
        python = str(folder / "bin" / "python")
        subprocess.run([UV, "pip", "install", "--quiet", "--python", python, requirement], check=True)

    version = f"{sys.version_info.major}{max(sys.version_info.minor, least[1])}"
    return cache.made(f"environment-{version}-{requirement.replace('==', '-')}", install, print) / "bin" / "python"


def _python(least: tuple[int, int]) -> str:
    """Return a Python of at least this version. Skips the test if the machine has none."""
    named = [shutil.which(f"python3.{minor}") for minor in range(least[1], least[1] + 3)]
    beside = Path(sys.base_prefix).parent.glob("3.*/bin/python")  # as pyenv keeps several
    for python in (sys.executable, *filter(None, named), *map(str, sorted(beside))):
        test = f"import sys; sys.exit(not {least} <= sys.version_info[:2] <= (3, 13))"
        if subprocess.run([python, "-c", test], capture_output=True, check=False).returncode == 0:
            return python
    pytest.skip(f"not run: this machine has no Python {least[0]}.{least[1]} or 3.13")


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
        port = free_port()
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
        """Return the interpreter of the server."""
        return str(interpreter(self.requirement, least=self.least))

    def kill(self) -> None:
        """Kill the server."""
        self._process.kill()
        self._process.wait()

    def count(self) -> int:
        """Return the number of sessions that the server holds."""
        return int(httpx.get(f"{self.url}/sums/sessions_count").json())


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


def tau2_checkout() -> Path:
    """Return the checkout of tau2-bench in the cache. Skips the test if there is none, because it is not published."""
    folder = cache.folder() / "tau2-bench"
    needed = [folder / "data" / "tau2" / "domains" / "telecom" / "tasks_small.json", folder / "pyproject.toml"]
    if missing := [str(path) for path in needed if not path.is_file()]:
        pytest.skip(f"not run: there is no {missing[0]}; clone sierra-research/tau2-bench to {folder}")
    return folder


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []
