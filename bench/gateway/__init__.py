"""python -m bench gateway: what the gateway adds to a step, beside a bare echo on the same server and loop.

An open loop sends a step every 10 ms, whether earlier ones are answered or not, in turn to the gateway and to the echo.
The steps call a tool of retail-mini, which runs in the gateway's process. `overhead_ms_p50` is the difference of the
two medians, `cpu_ms_per_step` the processor time of the gateway over that of the echo. `rss_mb_per_session` is the
growth of the gateway's memory, with its children for environments in processes of their own (proportional set size).
`mcp_over_direct_ms_p50`: a step of the MCP adapter through the gateway, over the adapter called in this process.
`--adapters` measures adapters alone (adapters.py).
"""

import argparse
import asyncio
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import psutil  # type: ignore[import-untyped]

from bench.gateway import adapters, subjects
from palimpsest.common.config.env_gateway import AdapterConfig
from palimpsest.common.environments.port import Turn
from palimpsest.common.environments.tool_calls import read, render
from palimpsest.services.env_gateway.adapters.mcp_tools import McpTools
from tools.backends.ports import free

START_S = 120.0
STEPS_OF_A_SESSION = 25
CALL = render("get_stock", {"product": "lamp"})
MCP = AdapterConfig(
    kind="mcp",
    command=(sys.executable, str(Path(__file__).with_name("mcp_server.py"))),
    tasks="bench.gateway.mcp_tasks:Echo",
)
RUN = """
run.id = "bench"
model.path = "none"
learner.versions = 1
tasks.environments = {{ retail-mini = 1.0 }}
[env_gateway]
port = {port}
max_processes = 1024
plugins = {{ own = "bench.gateway.mcp_tasks:Echo" }}
[env_gateway.adapters.mcp]
kind = "mcp"
command = {command}
tasks = "{tasks}"
"""


@dataclass
class Latencies:
    """Durations of requests in milliseconds."""

    gateway: list[float]
    echo: list[float]


def main(words: Sequence[str]) -> dict[str, Any]:
    """Measure and return the numbers."""
    parser = argparse.ArgumentParser(prog="python -m bench gateway", description=__doc__)
    parser.add_argument("--seconds", type=float, default=20.0, help="length of each open loop")
    parser.add_argument("--rate", type=float, default=100.0, help="steps a second to the gateway")
    parser.add_argument("--sessions", default="64,512", help="live sessions of each measurement")
    parser.add_argument("--isolated", default="64", help="live sessions with a process each")
    parser.add_argument("--mcp-steps", type=int, default=200, help="0 leaves out the MCP adapter")
    parser.add_argument("--adapters", default="", help=f"measure only these adapters: {','.join(subjects.KINDS)}")
    parser.add_argument("--steps", type=int, default=360, help="steps of each adapter of --adapters")
    options = parser.parse_args(words)
    kinds = [kind for kind in options.adapters.split(",") if kind]
    if unknown := set(kinds) - set(subjects.KINDS):
        parser.error(f"--adapters: {', '.join(sorted(unknown))} is not one of {', '.join(subjects.KINDS)}")
    if kinds:
        load = f"{os.getloadavg()[0]:.1f}"
        return {"load": load, "steps": options.steps, **adapters.over_direct(kinds, options.steps)}
    return asyncio.run(_measured(options))


async def _measured(options: argparse.Namespace) -> dict[str, Any]:
    result: dict[str, Any] = {"rate": options.rate, "seconds": options.seconds, "by_sessions": {}}
    with _gateway(mcp=options.mcp_steps > 0) as (gateway, url), _echo() as (echo, echo_url):
        limits = httpx.Limits(max_connections=256, max_keepalive_connections=256)
        async with httpx.AsyncClient(timeout=60.0, limits=limits) as client:
            for count in _numbers(options.sessions):
                result["by_sessions"][count] = await _at(client, url, echo_url, gateway, echo, count, options)
            for count in _numbers(options.isolated):
                memory = await _memory(client, url, gateway, "own", count)
                result.setdefault("isolated_rss_mb_per_session", {})[count] = memory
            if options.mcp_steps:
                through = await _mcp_through(client, url, options.mcp_steps)
                direct = await asyncio.to_thread(_mcp_direct, options.mcp_steps)
                result["mcp_ms_p50"], result["mcp_direct_ms_p50"] = round(through, 3), round(direct, 3)
                result["mcp_over_direct_ms_p50"] = round(through - direct, 3)
    result["overhead_ms_p50"] = next(iter(result["by_sessions"].values()))["overhead_ms_p50"]
    return result


async def _at(
    client: httpx.AsyncClient,
    url: str,
    echo_url: str,
    gateway: psutil.Process,
    echo: psutil.Process,
    count: int,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Return the numbers with this many live sessions."""
    before = gateway.memory_info().rss
    lanes = [Lane(client, url, seed) for seed in range(count)]
    for lane in lanes:
        await lane.begin()
    memory = (gateway.memory_info().rss - before) / count / 2**20
    found, at = Latencies([], []), [_cpu(gateway), _cpu(echo)]
    waiting: set[asyncio.Task[None]] = set()
    began, sent = time.perf_counter(), 0
    while (due := sent / options.rate) < options.seconds:
        await asyncio.sleep(max(0.0, began + due - time.perf_counter()))
        for send in (lanes[sent % count].step(found.gateway), _post(client, echo_url, BODY, found.echo)):
            task = asyncio.ensure_future(send)
            waiting.add(task)
            task.add_done_callback(waiting.discard)
        sent += 1
    await asyncio.gather(*waiting)
    used = [_cpu(gateway) - at[0], _cpu(echo) - at[1]]
    for lane in lanes:
        await lane.end()
    return {
        "overhead_ms_p50": round(median(found.gateway) - median(found.echo), 3),
        "gateway_ms_p50": round(median(found.gateway), 3),
        "gateway_ms_p99": round(_share(found.gateway, 0.99), 3),
        "echo_ms_p50": round(median(found.echo), 3),
        "echo_ms_p99": round(_share(found.echo, 0.99), 3),
        "cpu_ms_per_step": round((used[0] - used[1]) / sent * 1e3, 3),
        "rss_mb_per_session": round(memory, 4),
        "steps": sent,
    }


BODY = {"step": 0, "action": {"type": "text", "text": CALL}}


class Lane:
    """One session after another. Steps of a lane follow each other."""

    def __init__(self, client: httpx.AsyncClient, url: str, seed: int, environment: str = "retail-mini") -> None:
        self._client, self._url, self._seed, self._environment = client, url, seed, environment
        self._step = 0
        self._lock = asyncio.Lock()

    async def begin(self) -> None:
        """Create a session."""
        wanted = {"environment": self._environment, "seed": self._seed}
        reply = await self._client.post(f"{self._url}/v1/sessions", json=wanted)
        reply.raise_for_status()
        self._session, self._step = reply.json()["session_id"], 0

    async def step(self, durations: list[float], text: str = CALL) -> None:
        """Take a step, in a new session if this one is used up."""
        async with self._lock:
            if self._step == STEPS_OF_A_SESSION and self._environment == "retail-mini":
                await self.end()
                await self.begin()
            body = {"step": self._step, "action": {"type": "text", "text": text}}
            await _post(self._client, f"{self._url}/v1/sessions/{self._session}/step", body, durations)
            self._step += 1

    async def end(self) -> None:
        """Delete the session."""
        (await self._client.delete(f"{self._url}/v1/sessions/{self._session}")).raise_for_status()


async def _post(client: httpx.AsyncClient, url: str, body: Any, durations: list[float]) -> None:
    began = time.perf_counter()
    reply = await client.post(url, json=body)
    durations.append((time.perf_counter() - began) * 1e3)
    reply.raise_for_status()


async def _memory(client: httpx.AsyncClient, url: str, gateway: psutil.Process, name: str, count: int) -> float:
    """Return the memory of a session in a process of its own, in MiB."""
    lanes = [Lane(client, url, seed, name) for seed in range(count + 1)]
    await lanes[0].begin()  # starts the fork server
    before = _proportional(gateway)
    for lane in lanes[1:]:
        await lane.begin()
    grown = _proportional(gateway) - before
    for lane in lanes:
        await lane.end()
    return round(grown / count / 2**20, 3)


async def _mcp_through(client: httpx.AsyncClient, url: str, steps: int) -> float:
    lane, durations = Lane(client, url, 0, "mcp"), list[float]()
    await lane.begin()
    for number in range(steps):
        await lane.step(durations, render("echo", {"text": str(number)}))
        if number % 50 == 49:  # an MCP session has a limit of turns
            await lane.end()
            await lane.begin()
    await lane.end()
    return median(durations)


def _mcp_direct(steps: int) -> float:
    durations = []
    for first in range(0, steps, 50):
        adapter = McpTools(MCP.model_dump_json())
        adapter.reset(0)
        for number in range(first, min(first + 50, steps)):
            turn: Turn = read(render("echo", {"text": str(number)}))
            began = time.perf_counter()
            adapter.step(turn)
            durations.append((time.perf_counter() - began) * 1e3)
        adapter.close()
    return median(durations)


@contextmanager
def _gateway(*, mcp: bool) -> Iterator[tuple[psutil.Process, str]]:
    port = free()
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run.toml"
        command = "[" + ", ".join(f'"{word}"' for word in MCP.command) + "]"
        text = RUN.format(port=port, command=command, tasks=MCP.tasks)
        run.write_text(text if mcp else text.partition("[env_gateway.adapters.mcp]")[0])
        with _program("palimpsest.services.env_gateway", str(run)) as process:
            _wait(process, f"http://127.0.0.1:{port}/readyz")
            yield process, f"http://127.0.0.1:{port}"


@contextmanager
def _echo() -> Iterator[tuple[psutil.Process, str]]:
    port = free()
    with _program("bench.gateway.echo", str(port)) as process:
        _wait(process, f"http://127.0.0.1:{port}/")
        yield process, f"http://127.0.0.1:{port}/"


@contextmanager
def _program(module: str, argument: str) -> Iterator[psutil.Process]:
    with subprocess.Popen([sys.executable, "-m", module, argument], stderr=subprocess.DEVNULL) as process:
        try:
            yield psutil.Process(process.pid)
        finally:
            process.terminate()


def _wait(process: psutil.Process, url: str) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        try:
            if httpx.get(url).is_success:
                return
        except httpx.TransportError:
            time.sleep(0.05)
        if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
            raise RuntimeError(f"the program for {url} ended")
    raise RuntimeError(f"{url} does not answer")


def _cpu(process: psutil.Process) -> float:
    used = process.cpu_times()
    return float(used.user + used.system)


def _proportional(process: psutil.Process) -> int:
    return sum(int(one.memory_full_info().pss) for one in (process, *process.children(recursive=True)))


def _share(values: list[float], share: float) -> float:
    return sorted(values)[int(share * (len(values) - 1))]


def _numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",") if word]
