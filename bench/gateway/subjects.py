"""Adapters for `python -m bench gateway --adapters`: each with its settings, the model's message and the direct call.

The servers of `ors` and `openenv` are `palimpsest env serve`. The other packages lie in the cache, as for the tests of
the adapters; `tau2` and `vitabench` need a checkout there.
"""

import importlib
import io
import json
import secrets
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from bench.gateway.programs import answering, program
from palimpsest.common.environments.tool_calls import render
from palimpsest.services.env_gateway.adapters.mcp_tools import McpConnection
from tools.backends import checkouts, packages
from tools.backends.ports import free

STOCK = ("get_stock", {"product": "lamp"})
HERE = Path(__file__).parent


@dataclass
class Subject:
    """One adapter."""

    table: Mapping[str, Any]
    """Its table in the run file."""
    text: Callable[[int], str]
    """Step of a session -> the model's message."""
    direct: Callable[[int], None]
    """Makes the call of a step directly; a step -1 begins a session."""
    path: tuple[str, ...] = ()
    """Folders with its packages."""


@contextmanager
def _mcp() -> Iterator[Subject]:
    from mcp import StdioServerParameters

    server = str(HERE / "mcp_server.py")
    connection = McpConnection(StdioServerParameters(command=sys.executable, args=[server]))

    def direct(step: int) -> None:
        if step >= 0:
            connection.call("echo", {"text": str(step)})

    table = {"kind": "mcp", "command": [sys.executable, server], "tasks": "bench.gateway.mcp_tasks:Echo"}
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
def _nemo_gym() -> Iterator[Subject]:
    schema = {"type": "object", "properties": {"text": {"type": "string"}}}
    tool = {"type": "function", "name": "echo", "description": "", "parameters": schema, "strict": False}
    row = {"responses_create_params": {"input": [{"role": "user", "content": "Echo."}], "tools": [tool]}}
    port = free()
    url = f"http://127.0.0.1:{port}"
    python = str(packages.interpreter("nemo-gym==0.4.0", least=(3, 12)))
    with (
        tempfile.TemporaryDirectory() as folder,
        program([str(HERE / "nemo_gym_echo.py"), str(port)], python=python),
        httpx.Client(base_url=answering(url, "/openapi.json")) as client,
    ):
        rows = Path(folder) / "rows.jsonl"
        rows.write_text(json.dumps(row) + "\n")

        def direct(step: int) -> None:
            path, body = ("/seed_session", row) if step < 0 else ("/echo", {"text": str(step)})
            client.post(path, json=body).raise_for_status()

        table = {"kind": "nemo_gym", "url": url, "tasks": str(rows)}
        yield Subject(table, lambda step: render("echo", {"text": str(step)}), direct)


@contextmanager
def _gymnasium() -> Iterator[Subject]:
    folder = _on_path(packages.library("gymnasium==1.4.0"))
    name = "bench.gateway.gymnasium_echo:Echo-v0"
    environment = importlib.import_module("gymnasium").make(name, disable_env_checker=True)

    def direct(step: int) -> None:
        environment.reset(seed=0) if step < 0 else environment.step(str(step))

    yield Subject({"kind": "gymnasium", "id": name}, str, direct, folder)


@contextmanager
def _textarena() -> Iterator[Subject]:
    folder = _on_path(packages.library("textarena==0.7.4"))
    package = importlib.import_module("textarena")
    games: list[Any] = []

    def direct(step: int) -> None:
        if step < 0:
            games[:] = [package.make(env_id="GuessTheNumber-v0-raw")]
            games[0].reset(num_players=1, seed=0)
            return
        games[0].step(action=f"[{step + 1}]")
        games[0].get_observation()

    table = {"kind": "textarena", "id": "GuessTheNumber-v0-raw", "reward_range": [-1.0, 1.0]}
    yield Subject(table, lambda step: f"[{step + 1}]", direct, folder)


@contextmanager
def _skyrl_gym() -> Iterator[Subject]:
    """GSM8K. A session has one step."""
    library = _on_path(packages.library("skyrl-gym==0.4.0"))
    package = importlib.import_module("skyrl_gym")
    row = {"prompt": [{"role": "user", "content": "What is 2 + 3?"}], "reward_spec": {"ground_truth": "5"}}
    made: list[Any] = []

    def direct(step: int) -> None:
        if step < 0:
            made[:] = [package.make("gsm8k", env_config={}, extras=row)]
            made[0].init(row["prompt"])
            return
        made[0].step("It is #### 5")

    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        rows.write_text(json.dumps(row) + "\n")
        table = {"kind": "skyrl_gym", "id": "gsm8k", "tasks": str(rows)}
        yield Subject(table, lambda _: "It is #### 5", direct, library)


@contextmanager
def _tau2() -> Iterator[Subject]:
    """A tool of telecom in solo mode. The direct call is that of tau2-bench's environment, without its orchestrator."""
    folder = checkouts.TAU2.folder()
    library = _on_path(checkouts.TAU2.library(), folder / "src")
    asked = ("get_customer_by_id", {"customer_id": "C1001"})
    environments: list[Any] = []

    def direct(step: int) -> None:
        if step < 0:
            build = importlib.import_module("tau2.runner.build").build_environment
            environments[:] = [build("telecom", solo_mode=True)]
            return
        call = importlib.import_module("tau2.data_model.message").ToolCall
        environments[0].get_response(call(id="1", name=asked[0], arguments=asked[1], requestor="assistant"))

    importlib.import_module("palimpsest.services.env_gateway.adapters.tau2_imports")
    importlib.import_module("loguru").logger.disable("tau2")
    table = {"kind": "tau2", "checkout": str(folder), "id": "telecom", "split": "small", "user": "none"}
    yield Subject(table, lambda _: render(*asked), direct, library[:1])


@contextmanager
def _vitabench() -> Iterator[Subject]:
    """A tool of delivery. The direct call is that of VitaBench's environment, without its orchestrator."""
    folder = checkouts.VITABENCH.folder()
    library = _on_path(checkouts.VITABENCH.library(), folder / "src")
    asked = ("delivery_distance_to_time", {"distance": 100.0})
    environments: list[Any] = []
    importlib.import_module("loguru").logger.disable("vita")
    with redirect_stdout(io.StringIO()):
        registry = importlib.import_module("vita.registry").registry
    task = registry.get_tasks_loader("delivery")("english")[0]

    def direct(step: int) -> None:
        if step < 0:
            environments[:] = [registry.get_env_constructor("delivery")(task.environment, "english")]
            return
        call = importlib.import_module("vita.data_model.message").ToolCall
        environments[0].get_response(call(id="1", name=asked[0], arguments=asked[1]))

    port = free()
    url = f"http://127.0.0.1:{port}"
    with program(["-m", "bench.gateway.chat_server", str(port)]):
        table = {
            "kind": "vitabench", "checkout": str(folder), "id": "delivery", "language": "english",
            "url": answering(url), "user_model": "m", "judge_url": url, "judge_model": "m",
        }  # fmt: skip
        yield Subject(table, lambda _: render(*asked), direct, library[:1])


@contextmanager
def _served(kind: str) -> Iterator[str]:
    port = free()
    with program(["-m", "palimpsest", "env", "serve", "retail-mini", "--as", kind, "--port", str(port)]):
        yield answering(f"http://127.0.0.1:{port}")


def _on_path(*folders: Path) -> tuple[str, ...]:
    """Append these folders to sys.path and return them."""
    named = tuple(map(str, folders))
    sys.path += named
    return named


MADE: Mapping[str, Callable[[], AbstractContextManager[Subject]]] = {
    "mcp": _mcp, "ors": _ors, "openenv": _openenv, "nemo_gym": _nemo_gym, "gymnasium": _gymnasium,
    "textarena": _textarena, "skyrl_gym": _skyrl_gym, "tau2": _tau2, "vitabench": _vitabench,
}  # fmt: skip
KINDS = tuple(MADE)
