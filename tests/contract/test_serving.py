"""Environments of this project served to clients of others: OpenEnv, MCP and the Open Reward Standard.

Clients are our adapters, the client of the package `mcp`, and, in the long test, the clients of openenv and openreward.
"""

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, get_args

import httpx
import pytest
from mcp import Client
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from palimpsest.common.config.env_gateway import AdapterConfig
from palimpsest.common.control.access import Access, Role, Token, digest
from palimpsest.common.environments.lookup import Lookup
from palimpsest.common.environments.port import EnvironmentFailed, Message, Reply, Score, Turn
from palimpsest.common.environments.tool_calls import read
from palimpsest.common.environments.worlds.retail import RetailMini
from palimpsest.common.service import Stop, listen, serve_sockets
from palimpsest.common.sessions.registry import FAMILIES, WORLDS, Entry, built_in
from palimpsest.common.sessions.sessions import SessionLimits, Sessions
from palimpsest.common.sessions.wire import ToolCall
from palimpsest.env import Task, from_tools
from palimpsest.services.env_gateway.adapters.adapter import AdapterEnvironment
from palimpsest.services.env_gateway.adapters.mcp_tools import McpTools
from palimpsest.services.env_gateway.adapters.openenv_session import OpenEnvSession
from palimpsest.services.env_gateway.adapters.ors import OrsEnvironment
from palimpsest.services.env_gateway.serving.served_session import tools_of
from palimpsest.services.env_gateway.serving.server import MAX_BYTES, Kind, first_tools, served, shape
from tests.unit.env_gateway.fakes import ScriptedWorld, counter_value, reply
from tools.backends.packages import interpreter

Asked = from_tools(start=lambda seed: Task(f"Task {seed}", None), reward=lambda _state, _answer: 0.0)
"""Tasks for the tools of an MCP server."""
HERE = Path(__file__).parent / "serving"
LIMITS = SessionLimits(max_sessions=8, lease_s=600.0, remember_s=60.0, result_bytes=65536)
OPEN = Access(hosts=frozenset({"localhost"}))
ADAPTERS = {"openenv": OpenEnvSession, "ors": OrsEnvironment}
Calls = list[tuple[str, dict[str, Any]]]


class Running:
    """A served environment in a thread."""

    def __init__(self, kind: Kind, name: str, access: Access = OPEN, fake: ScriptedWorld | None = None) -> None:
        async def opened() -> ScriptedWorld:
            assert fake is not None
            return fake

        registry = built_in() | ({"fake": Entry("fake", "7", "", False, opened)} if fake else {})
        self.sessions = Sessions(registry, LIMITS)
        tools = tools_of(()) if fake else asyncio.run(first_tools(Sessions(registry, LIMITS), name))
        routes = shape(kind, self.sessions, registry, name, tools=tools, tasks=50, access=access)
        app, self._stop = served(routes, self.sessions, access=access), Stop()
        listening = listen("127.0.0.1", 0, key="served")
        self.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        serving = partial(serve_sockets, app, listening, max_bytes=MAX_BYTES, stop=self._stop)
        self._thread = threading.Thread(target=lambda: asyncio.run(serving()))

    def __enter__(self) -> "Running":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.request()
        self._thread.join()


def turns_of(name: str, seed: int) -> list[Turn]:
    """Messages of the model that solve the task."""
    if name in FAMILIES:
        texts = FAMILIES[name].solution(seed)
    else:
        world, split = name.partition(".")[::2]
        texts = WORLDS[world][0].solution(seed, split or "train")
    return [read(text) for text in texts]


def solution(name: str, seed: int) -> Calls:
    """Calls that solve the task, messages as send_message."""
    turns = turns_of(name, seed)
    return [call for turn in turns for call in ([(one.name, one.arguments) for one in turn.calls] or [sent(turn.text)])]


def sent(text: str) -> tuple[str, dict[str, Any]]:
    return "send_message", {"text": text}


@contextmanager
def adapter(kind: str, url: str, **keys: Any) -> Iterator[AdapterEnvironment]:
    environment = ADAPTERS[kind](AdapterConfig(kind=kind, url=url, **keys).model_dump_json())
    try:
        yield environment
    finally:
        environment.close()


def play(environment: AdapterEnvironment, calls: Sequence[tuple[str, dict[str, Any]]]) -> Score:
    for name, arguments in calls:
        outcome = environment.step(Turn("", (ToolCall(name=name, arguments=arguments),)))
        if isinstance(outcome, Score):
            return outcome
    return environment.finalize()


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("name", ["lookup", "hop", "retail-mini", "telecom-mini"])
def test_the_solution_earns_1_through_our_adapter_and_another_policy_less(kind: Kind, name: str) -> None:
    with Running(kind, name) as running:
        for seed in (3, 4):
            with adapter(kind, running.url) as one, adapter(kind, running.url) as other:
                opening, again = one.reset(seed), other.reset(seed)
                assert opening == again
                assert "send_message" not in [schema["function"]["name"] for schema in opening.tools]
                assert play(other, [sent("I do not know.")] * 3).reward < 1
                assert play(one, solution(name, seed)) == Score(1.0, True, {"own_reward": 1.0})
        while running.sessions.live:  # a closed connection ends its session
            pass


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("name", ["lookup", "retail-mini"])
def test_our_adapter_sends_messages_without_a_tool_call(kind: Kind, name: str) -> None:
    """So a policy of the environment itself sees the same tools and earns the same."""
    own = Lookup().reset(3).tools if name == "lookup" else RetailMini().reset(3).tools
    with Running(kind, name) as running:
        for seed in (3, 4):
            with adapter(kind, running.url) as environment:
                shown = environment.reset(seed).tools
                assert [one["function"]["name"] for one in shown] == [one["function"]["name"] for one in own]
                *before, last = [environment.step(turn) for turn in turns_of(name, seed)]
                assert all(isinstance(outcome, Reply) and not outcome.tool_errors for outcome in before)
                assert last == Score(1.0, True, {"own_reward": 1.0})


@pytest.mark.parametrize("kind", ADAPTERS)
def test_the_reply_to_a_message_is_one_of_the_user(kind: Kind) -> None:
    world = ScriptedWorld(reply("and then?"), Score(0.25, False))
    with Running(kind, "fake", fake=world) as running, adapter(kind, running.url) as environment:
        environment.reset(3)
        assert environment.step(Turn("hello")) == Reply((Message(role="user", content="and then?"),))
        assert environment.step(Turn("bye")) == Score(0.25, False, {"own_reward": 0.25})
        assert [turn.answer for turn in world.turns] == ["hello", "bye"]


@pytest.mark.parametrize("kind", ["ors", "mcp"])
def test_a_session_loads_no_module_and_reads_no_certificates(kind: Kind) -> None:
    """The fork server has done both for all sessions; in each session it took several times as long as the rest."""
    with Running(kind, "lookup") as running:
        url = f"{running.url}/tasks/{{seed}}/mcp" if kind == "mcp" else running.url
        config = AdapterConfig(kind=kind, url=url, tasks=f"{__name__}:Asked" if kind == "mcp" else "")
        found = subprocess.run(
            [sys.executable, str(HERE / "forked_session.py"), config.model_dump_json()],
            capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )  # fmt: skip
        assert json.loads(found.stdout) == {"loaded": [], "contexts": 0}, found.stderr


def test_a_seed_in_the_url_of_mcp_is_the_task() -> None:
    with Running("mcp", "lookup") as running:
        url, tasks = f"{running.url}/tasks/{{seed}}/mcp", f"{__name__}:Asked"
        results = []
        for seed in (3, 4):
            environment = McpTools(AdapterConfig(kind="mcp", url=url, tasks=tasks).model_dump_json())
            environment.reset(seed)
            results.append(environment.step(turns_of("lookup", seed)[0]))
            environment.close()
        expected = [turns_of("lookup", seed)[1].text for seed in (3, 4)]
        assert expected[0] != expected[1]
        assert [result.messages[0].content for result in results] == expected


def test_a_split_of_ors_is_an_environment() -> None:
    with Running("ors", "airline-mini") as running, adapter("ors", running.url, split="test") as environment:
        opening = environment.reset(3)
        assert play(environment, solution("airline-mini.test", 3)).reward == 1
        assert running.sessions.status()["environments"]["airline-mini.test"] == {"terminated": 1}
        assert opening.messages[0].content != ""


def test_the_client_of_mcp_has_the_tools_the_task_and_no_reward() -> None:
    async def played(url: str) -> None:
        async with Client(f"{url}/tasks/3/mcp") as client, Client(f"{url}/tasks/6/mcp") as other:
            assert [tool.name for tool in (await client.list_tools()).tools] == ["lookup", "send_message"]
            assert client.instructions != other.instructions
            texts = [await client.call_tool(name, arguments) for name, arguments in solution("hop", 3)]
            assert texts[-1].content[0].text == "The task is over."
            assert not any(text.is_error for text in texts)
            assert (await client.call_tool(*sent("again"))).is_error
            assert (await other.call_tool(*sent("I do not know."))).content[0].text

    before = counter_value("palimpsest_gateway_reward_sum", environment="hop")
    with Running("mcp", "hop") as running:
        asyncio.run(played(running.url))
        assert counter_value("palimpsest_gateway_reward_sum", environment="hop") == before + 1
        while running.sessions.live:
            pass


def test_a_call_of_ors_whose_stream_broke_is_not_applied_again() -> None:
    world = ScriptedWorld(reply("first"), reply("second"))
    with Running("ors", "fake", fake=world) as running, httpx.Client(base_url=running.url) as client:
        client.headers["X-Session-ID"] = "mine"
        assert client.post("/create", json={"split": "train", "index": 1}).json() == {"sid": "mine"}
        call = {"name": "send_message", "input": {"text": "hello"}}
        answers = [client.post("/fake/call", json=call).text]
        task_id = answers[0].split("data: ")[1].split("\r\n")[0]
        answers += [client.post("/fake/call", json=call | {"task_id": task_id}).text for _ in range(3)]
        assert set(answers) == {answers[0]}
        assert '"first"' in answers[0]
        assert len(world.turns) == 1


def test_without_a_seed_or_a_task_the_request_is_refused() -> None:
    with Running("ors", "lookup") as running:
        body = {"split": "train", "index": 50}
        refused = httpx.post(f"{running.url}/create", json=body, headers={"X-Session-ID": "a"})
        assert (refused.status_code, refused.json()["detail"]) == (400, "Invalid index: tasks are 0 to 49")
    with Running("openenv", "lookup") as running, connect(running.url.replace("http", "ws") + "/ws") as socket:
        for message, code in (
            ({"type": "step", "data": {"tool_name": "lookup"}}, "EXECUTION_ERROR"),
            ({"type": "reset", "data": {"seed": "x"}}, "VALIDATION_ERROR"),
            ({"type": "jump"}, "UNKNOWN_TYPE"),
            ([], "VALIDATION_ERROR"),
        ):
            socket.send(json.dumps(message))
            assert json.loads(socket.recv())["data"]["code"] == code
        socket.send("{")
        assert json.loads(socket.recv())["data"]["code"] == "INVALID_JSON"


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_environment_that_fails_gives_no_reward(kind: Kind) -> None:
    world = ScriptedWorld(reply("4"), EnvironmentFailed("environment_raised", "it broke"))
    with Running(kind, "fake", fake=world) as running, adapter(kind, running.url) as environment:
        environment.reset(3)
        assert isinstance(environment.step(Turn("", (ToolCall(name=sent("a")[0], arguments={"text": "a"}),))), Reply)
        with pytest.raises(RuntimeError, match="it broke"):
            play(environment, [sent("b")])
        assert environment.rewards == []


@pytest.mark.parametrize("kind", get_args(Kind))
def test_only_clients_with_the_token_are_served(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    access = Access(lambda: (Token("client", Role.SERVICE, digest(b"of-the-test")),))
    monkeypatch.setenv("SERVED_TOKEN", "of-the-test")
    with Running(kind, "lookup", access) as running:
        if kind in ADAPTERS:
            with adapter(kind, running.url, token_variable="SERVED_TOKEN") as environment:
                environment.reset(3)
                assert play(environment, solution("lookup", 3)).reward == 1
        for method, path in (("POST", "/mcp"), ("GET", "/schema"), ("POST", "/create_session")):
            assert httpx.request(method, running.url + path, json={}).status_code == 401
        if kind == "openenv":
            with pytest.raises(InvalidStatus), connect(running.url.replace("http", "ws") + "/ws") as socket:
                socket.recv()


def test_a_page_of_another_site_cannot_connect() -> None:
    with Running("openenv", "lookup") as running:
        address = running.url.replace("http", "ws") + "/ws"
        with pytest.raises(InvalidStatus), connect(address, origin="http://evil.example") as socket:  # type: ignore[arg-type]
            socket.recv()


@pytest.mark.long
def test_the_clients_of_openenv_and_openreward_solve_the_task() -> None:
    calls = json.dumps(solution("lookup", 3))
    with Running("openenv", "lookup") as running:
        played = client("openenv==0.10.0", "play_openenv.py", running.url, calls)
        assert played["generic"] | {"state": None} == {
            "prompt": "What is the value of basil?", "reward": 1.0, "done": True, "state": None
        }  # fmt: skip
        assert (played["tools"], played["text"], played["reward"]) == (["lookup", "send_message"], "5", 1.0)
        assert running.sessions.status()["sessions"] == {"terminated": 2}
    with Running("ors", "lookup") as running:
        played = client("openreward==0.1.167", "play_ors.py", running.url, "lookup", calls)
        assert played == {
            "splits": ["train"], "tasks": 50, "prompt": "What is the value of basil?",
            "tools": ["lookup", "send_message"], "reward": 1.0, "finished": True,
        }  # fmt: skip


def client(requirement: str, program: str, *arguments: str) -> dict[str, Any]:
    """Run a client in the environment of its package."""
    command = [str(interpreter(requirement)), str(HERE / program), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    played: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return played
