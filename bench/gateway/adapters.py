"""python -m bench gateway --adapters KIND,...: a step of an adapter through the gateway, over the call made directly.

The direct call uses the package, or the protocol for a server, without the gateway, its process for the session and the
adapter. Both are made in turn. The servers of `ors` and `openenv` are `palimpsest env serve`. `gymnasium` and
`textarena` must be installed, or lie in a folder that --path names.
"""

import json
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import httpx

from palimpsest.common.environments.tool_calls import render
from palimpsest.services.env_gateway.adapters.mcp_tools import McpConnection
from tools.backends.ports import free

KINDS = ("mcp", "ors", "openenv", "gymnasium", "textarena")
START_S = 120.0
STEPS_OF_A_SESSION = 18
"""Fewer than a game of TextArena or a world permits."""
STOCK = ("get_stock", {"product": "lamp"})
HERE = Path(__file__).parent


@dataclass
class Subject:
    """One adapter: its table in the run file, the model's message, and the direct call."""

    table: Mapping[str, Any]
    text: Callable[[int], str]
    direct: Callable[[int], None]
    """Makes the call of a step directly; a step 0 begins a session first."""


def over_direct(kinds: Sequence[str], steps: int, paths: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return the durations by kind, in milliseconds."""
    sys.path[:0] = paths
    with ExitStack() as opened:
        subjects = {kind: opened.enter_context(MADE[kind]()) for kind in kinds}
        url = opened.enter_context(_gateway(subjects, paths))
        client = opened.enter_context(httpx.Client(base_url=url, timeout=60.0))
        return {kind: _measured(client, kind, subject, steps) for kind, subject in subjects.items()}


def _measured(client: httpx.Client, kind: str, subject: Subject, steps: int) -> dict[str, float]:
    through, direct, session, step = list[float](), list[float](), "", 0
    while len(through) < steps:
        if not session:
            created = client.post("/v1/sessions", json={"environment": kind, "seed": 0})
            session, step = created.raise_for_status().json()["session_id"], 0
            subject.direct(-1)
        began = time.perf_counter()
        subject.direct(step)
        between = time.perf_counter()
        body = {"step": step, "action": {"type": "text", "text": subject.text(step)}}
        reply = client.post(f"/v1/sessions/{session}/step", json=body).raise_for_status().json()
        through.append((time.perf_counter() - between) * 1e3)
        direct.append((between - began) * 1e3)
        step += 1
        if reply["error"] is not None:
            raise RuntimeError(f"the session of {kind} failed: {reply['error']}")
        if step == STEPS_OF_A_SESSION or reply["status"] != "running":
            client.delete(f"/v1/sessions/{session}").raise_for_status()
            session = ""
    found = {"through_ms_p50": median(through), "direct_ms_p50": median(direct)}
    found["over_direct_ms_p50"] = found["through_ms_p50"] - found["direct_ms_p50"]
    return {name: round(value, 3) for name, value in found.items()}


@contextmanager
def _mcp() -> Iterator[Subject]:
    from mcp import StdioServerParameters

    program = str(HERE / "mcp_server.py")
    connection = McpConnection(StdioServerParameters(command=sys.executable, args=[program]))

    def direct(step: int) -> None:
        if step >= 0:
            connection.call("echo", {"text": str(step)})

    table = {"kind": "mcp", "command": [sys.executable, program], "tasks": "bench.gateway.mcp_tasks:Echo"}
    try:
        yield Subject(table, lambda step: render("echo", {"text": str(step)}), direct)
    finally:
        connection.close()


@contextmanager
def _ors() -> Iterator[Subject]:
    with _served("ors") as url, httpx.Client(base_url=url) as client:

        def direct(step: int) -> None:
            if step < 0:
                client.headers["X-Session-ID"] = secrets.token_hex(8)
                client.post("/create", json={"split": "train", "index": 0}).raise_for_status()
                return
            client.post("/call", json={"name": STOCK[0], "input": STOCK[1]}).raise_for_status()

        yield Subject({"kind": "ors", "url": url}, lambda _: render(*STOCK), direct)


@contextmanager
def _openenv() -> Iterator[Subject]:
    from websockets.sync.client import connect

    with _served("openenv") as url, connect(url.replace("http", "ws") + "/ws") as socket:

        def direct(step: int) -> None:
            action = {"type": "call_tool", "tool_name": STOCK[0], "arguments": STOCK[1]}
            kind, data = ("reset", {"seed": 0}) if step < 0 else ("step", action)
            socket.send(json.dumps({"type": kind, "data": data}))
            json.loads(socket.recv())

        yield Subject({"kind": "openenv", "url": url}, lambda _: render(*STOCK), direct)


@contextmanager
def _gymnasium() -> Iterator[Subject]:
    import gymnasium

    name = "bench.gateway.gymnasium_echo:Echo-v0"
    environment = gymnasium.make(name, disable_env_checker=True)

    def direct(step: int) -> None:
        environment.reset(seed=0) if step < 0 else environment.step(str(step))

    yield Subject({"kind": "gymnasium", "id": name}, str, direct)


@contextmanager
def _textarena() -> Iterator[Subject]:
    import textarena

    games: list[Any] = []

    def direct(step: int) -> None:
        if step < 0:
            games[:] = [textarena.make(env_id="GuessTheNumber-v0-raw")]
            games[0].reset(num_players=1, seed=0)
            return
        games[0].step(action=f"[{step + 1}]")
        games[0].get_observation()

    table = {"kind": "textarena", "id": "GuessTheNumber-v0-raw", "reward_range": [-1.0, 1.0]}
    yield Subject(table, lambda step: f"[{step + 1}]", direct)


MADE = {"mcp": _mcp, "ors": _ors, "openenv": _openenv, "gymnasium": _gymnasium, "textarena": _textarena}


@contextmanager
def _gateway(subjects: Mapping[str, Subject], paths: Sequence[str]) -> Iterator[str]:
    port = free()
    lines = ['run.id = "bench"', 'model.path = "none"', "learner.versions = 1", f"env_gateway.port = {port}"]
    for name, subject in subjects.items():
        lines += [f"env_gateway.adapters.{name}.{key} = {json.dumps(value)}" for key, value in subject.table.items()]
    lines.append(f"tasks.environments = {{ {', '.join(f'{name} = 1.0' for name in subjects)} }}")
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run.toml"
        run.write_text("\n".join(lines) + "\n")
        program = "import sys; sys.path[:0] = sys.argv.pop().split(':'); from runpy import run_module; run_module"
        start = f"{program}('palimpsest.services.env_gateway', run_name='__main__', alter_sys=True)"
        with _program(["-c", start, str(run), ":".join([*paths, str(Path.cwd())])]):
            yield _answering(f"http://127.0.0.1:{port}")


@contextmanager
def _served(kind: str) -> Iterator[str]:
    port = free()
    with _program(["-m", "palimpsest", "env", "serve", "retail-mini", "--as", kind, "--port", str(port)]):
        yield _answering(f"http://127.0.0.1:{port}")


@contextmanager
def _program(words: Sequence[str]) -> Iterator[None]:
    with subprocess.Popen([sys.executable, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            yield
        finally:
            process.terminate()


def _answering(url: str) -> str:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        try:
            if httpx.get(f"{url}/readyz").is_success:
                return url
        except httpx.TransportError:
            time.sleep(0.05)
    raise RuntimeError(f"{url} does not answer")
