"""A gateway in its own process, and functions that act on it."""

import asyncio
import json
import os
import re
import socket
import subprocess
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from tests.processes.waiting import LIMIT_S
from tools.backends.ports import free

ROOT = Path(__file__).parents[3]
AWKWARD = ROOT / "tests" / "unit" / "env_gateway" / "plugins"
START_LIMIT_S = LIMIT_S
RUN = """
run.id = "t"
model.path = "none"
tasks.environments = { lookup = 1.0 }
learner.versions = 1
"""


@dataclass
class Gateway:
    """A running gateway."""

    process: subprocess.Popen[str]
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def metric(self, line: str) -> float:
        """Return the value of the sample that begins like this; 0 if there is none."""
        found = re.search(
            rf"^{re.escape(line)} (\S+)$", httpx.get(f"{self.url}/metrics", timeout=LIMIT_S).text, re.MULTILINE
        )
        return float(found[1]) if found else 0.0

    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)


Launch = Callable[..., subprocess.Popen[str]]


@contextmanager
def launching(folder: Path) -> Iterator[Launch]:
    """Start `python -m palimpsest.services.env_gateway` with these flags; the context ends it."""
    started: list[subprocess.Popen[str]] = []
    run = folder / "run.toml"
    run.write_text(RUN)

    def launch(*flags: str, **environment: str) -> subprocess.Popen[str]:
        path = os.pathsep.join([str(ROOT), str(AWKWARD), str(folder)])
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("PALIMPSEST_")}
        process = subprocess.Popen(
            [sys.executable, "-m", "palimpsest.services.env_gateway", str(run), *flags],
            env={**inherited, "PYTHONPATH": path, **environment},
            stderr=subprocess.PIPE,
            text=True,
            cwd=folder,
        )
        started.append(process)
        return process

    yield launch
    for process in started:
        process.kill()
        process.communicate()


def answering(launch: Launch, *flags: str, **environment: str) -> Gateway:
    """Start a gateway and wait until it answers."""
    port = free()
    process = launch(f"--env_gateway.port={port}", *flags, **environment)
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[1]
        try:
            if httpx.get(f"http://127.0.0.1:{port}/readyz").status_code == 200:
                return Gateway(process, port)
        except httpx.TransportError:
            time.sleep(0.02)
    raise AssertionError("the gateway does not answer")


def plugged_in(*names: str) -> str:
    """The flag that plugs in the environments of plugins/awkward.py."""
    paths = ", ".join(f'{name.lower()} = "awkward:{name}"' for name in names)
    return f"--env_gateway.plugins={{ {paths} }}"


def refusal(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, output = process.communicate(timeout=START_LIMIT_S)
    assert "Traceback" not in output
    return process.returncode, output


class LosesAnswers:
    """A proxy that forwards every request and loses the first answer to every third one.

    lost: lost answers to `create` requests, and to steps: a lost batch counts with each of its steps.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self._seen: Counter[bytes] = Counter()
        self.lost: Counter[str] = Counter()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream_reader, upstream = await asyncio.open_connection("127.0.0.1", self._port)
        try:
            while request := await self._message(reader):
                upstream.write(request)
                answer = await self._message(upstream_reader)
                self._seen[request] += 1
                if self._seen[request] == 1 and zlib.crc32(request) % 3 == 0:
                    self._count(request)
                    return
                writer.write(answer)
        finally:
            upstream.close()
            writer.close()

    async def _message(self, reader: asyncio.StreamReader) -> bytes:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError:
            return b""
        if b"transfer-encoding: chunked" in head.lower():
            return head + await reader.readuntil(b"\r\n0\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
        return head + await reader.readexactly(int(length[1]) if length else 0)

    def _count(self, request: bytes) -> None:
        head, _, body = request.partition(b"\r\n\r\n")
        line = head.partition(b"\r\n")[0]
        if b"/v1/steps " in line:
            self.lost["step"] += len(json.loads(body)["steps"])
        else:
            self.lost["step" if b"/step " in line else "create"] += 1


async def until(holds: Callable[[], bool]) -> None:
    """Poll until the condition holds."""
    async with asyncio.timeout(START_LIMIT_S):
        while not holds():
            await asyncio.sleep(0.02)


def accepts(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
