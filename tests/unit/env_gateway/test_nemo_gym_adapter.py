"""The adapter of NeMo Gym against a small server of the same protocol: sessions by cookie, one verification."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from fastapi import FastAPI, Request, Response

from palimpsest.common.config.env_gateway import AdapterConfig
from palimpsest.common.environments.port import Message, Reply, Score, ToolCall, Turn
from palimpsest.common.service import Server
from palimpsest.services.env_gateway.adapters.adapter import AdapterUnusable
from palimpsest.services.env_gateway.adapters.nemo_gym_server import NemoGymServer

TOOL = {"type": "function", "name": "add", "description": "Add.", "parameters": {"properties": {"number": {}}}}
ROW = {"responses_create_params": {"input": "Reach 3.", "tools": [TOOL]}, "number": 3}


class Counters:
    """A server with the routes of a resources server. The tool `add` counts up in the session of the cookie."""

    def __init__(self) -> None:
        self.sums: dict[str, int] = {}
        self.verified: list[dict[str, Any]] = []
        self.reward: Any = None
        """Instead of the reward 1 for the row's number, else 0."""
        app = FastAPI()
        app.post("/seed_session")(self._seed)
        app.post("/add")(self._add)
        app.post("/verify")(self._verify)
        self.app = app

    async def _seed(self, response: Response) -> dict[str, str]:
        response.set_cookie("session", name := uuid4().hex)
        self.sums[name] = 0
        return {}

    async def _add(self, request: Request) -> Response:
        number = (await request.json()).get("number")
        if number == "broken":
            return Response("the tool is broken", status_code=500)
        if not isinstance(number, int):
            return Response("number must be a whole number", status_code=422)
        self.sums[request.cookies["session"]] += number
        response = Response(json.dumps({"sum": self.sums[request.cookies["session"]]}))
        response.set_cookie("session", request.cookies["session"])  # signed again with each reply, as by NeMo Gym
        return response

    async def _verify(self, request: Request) -> dict[str, Any]:
        body = await request.json()
        self.verified.append(body)
        right = float(self.sums[request.cookies["session"]] == body["number"])
        return {**body, "reward": right if self.reward is None else self.reward}


@pytest.fixture
def counters() -> Counters:
    return Counters()


@pytest.fixture
def url(counters: Counters) -> Iterator[str]:
    with Server(counters.app, "127.0.0.1", 0, key="counters") as server:
        yield f"http://127.0.0.1:{server.port}"


def settings(folder: Path, url: str, *rows: Any, **keys: Any) -> str:
    """The settings of an adapter for these rows."""
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows or (ROW,)))
    return AdapterConfig(kind="nemo_gym", url=url, tasks=str(file), **keys).model_dump_json()


def add(number: Any, text: str = "") -> Turn:
    return Turn(text, (ToolCall(name="add", arguments={"number": number}),))


def test_sessions_keep_apart_by_their_cookies(tmp_path: Path, url: str) -> None:
    one, other = (NemoGymServer(settings(tmp_path, url)) for _ in range(2))
    opening = one.reset(0)
    other.reset(0)
    assert opening.messages == (Message(role="user", content="Reach 3."),)
    assert [tool["function"]["name"] for tool in opening.tools] == ["add"]
    assert other.step(add(1)) == Reply((Message(role="tool", content='{"sum": 1}'),))
    assert one.step(add(1)) == Reply((Message(role="tool", content='{"sum": 1}'),))
    assert one.step(add(2)) == Reply((Message(role="tool", content='{"sum": 3}'),))
    assert one.step(Turn("done")) == Score(1.0, True, {"own_reward": 1.0})
    assert other.finalize() == Score(0.0, False, {"own_reward": 0.0})


def test_the_server_verifies_all_items_of_the_session_once(tmp_path: Path, url: str, counters: Counters) -> None:
    environment = NemoGymServer(settings(tmp_path, url))
    environment.reset(0)
    environment.step(add(3, "I add."))
    environment.step(Turn("It is 3."))
    with pytest.raises(RuntimeError, match="verified already"):
        environment.finalize()
    (verified,) = counters.verified
    assert verified["number"] == 3
    items = verified["response"]["output"]
    assert [item["type"] for item in items] == ["message", "function_call", "function_call_output", "message"]
    assert json.loads(items[1]["arguments"]) == {"number": 3}
    assert (items[2]["call_id"], items[2]["output"]) == (items[1]["call_id"], '{"sum": 3}')
    assert items[3]["content"][0]["text"] == "It is 3."


def test_a_refused_call_is_a_result_and_a_broken_server_an_error(tmp_path: Path, url: str) -> None:
    environment = NemoGymServer(settings(tmp_path, url))
    environment.reset(0)
    refused = environment.step(add("x"))
    assert refused == Reply((Message(role="tool", content="number must be a whole number"),), 1)
    unknown = environment.step(Turn("", (ToolCall(name="verify", arguments={}),)))
    assert unknown == Reply((Message(role="tool", content="error: there is no tool verify"),), 1)
    with pytest.raises(RuntimeError, match="POST /add: 500: the tool is broken"):
        environment.step(add("broken"))


@pytest.mark.parametrize(
    ("own", "bounds", "reward"), [(1, None, 1.0), (0.25, None, 0.25), (-1.0, (-1.0, 3.0), 0.0), (1.0, (-1.0, 3.0), 0.5)]
)
def test_the_reward_is_mapped_to_0_and_1(
    tmp_path: Path, url: str, counters: Counters, own: float, bounds: tuple[float, float] | None, reward: float
) -> None:
    environment = NemoGymServer(settings(tmp_path, url, reward_range=bounds))
    environment.reset(0)
    counters.reward = own
    assert environment.finalize() == Score(reward, reward == 1.0, {"own_reward": own})


@pytest.mark.parametrize(
    ("own", "problem"), [("1", "verified with the reward '1'"), (True, "reward True"), (2.0, "2, outside .0, 1.; set")]
)
def test_a_reward_that_is_none_is_an_error(
    tmp_path: Path, url: str, counters: Counters, own: Any, problem: str
) -> None:
    environment = NemoGymServer(settings(tmp_path, url))
    environment.reset(0)
    counters.reward = own
    with pytest.raises(ValueError, match=problem):
        environment.step(Turn("done"))


def asked(**given: Any) -> dict[str, Any]:
    return {"responses_create_params": given}


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"number": 3}, "has no responses_create_params"),
        (asked(tools=[TOOL]), "a row has no input"),
        (asked(input="x", tools=[{**TOOL, "name": "verify"}]), "names verify as a tool, which is a route"),
        (asked(input=[{"type": "function_call", "name": "add"}]), "type 'function_call'; only messages are read"),
        (asked(input=[{"role": "user", "content": [{"type": "input_image"}]}]), "only text is supported"),
    ],
)
def test_a_row_that_cannot_be_used_is_refused(tmp_path: Path, url: str, row: dict[str, Any], problem: str) -> None:
    with pytest.raises(AdapterUnusable, match=problem):
        NemoGymServer.probe(settings(tmp_path, url, row))


def test_what_is_missing_is_named(tmp_path: Path, url: str) -> None:
    with pytest.raises(AdapterUnusable, match=r"rows\.jsonl has no split 'test', only train"):
        NemoGymServer.probe(settings(tmp_path, url, split="test"))
    with pytest.raises(AdapterUnusable, match=r"http://127\.0\.0\.1:9 cannot be reached"):
        NemoGymServer.probe(settings(tmp_path, "http://127.0.0.1:9"))
    absent = AdapterConfig(kind="nemo_gym", url=url, tasks=str(tmp_path / "absent.jsonl")).model_dump_json()
    with pytest.raises(AdapterUnusable, match=r"absent\.jsonl: there is no such file"):
        NemoGymServer.probe(absent)


def test_the_line_of_the_list_names_the_server_and_the_tasks(tmp_path: Path, url: str) -> None:
    assert NemoGymServer.probe(settings(tmp_path, url)) == f"{url} (NeMo Gym), 1 tasks, 1 tools"


def test_texts_of_all_roles_open_the_session(tmp_path: Path, url: str) -> None:
    items = [
        {"role": "developer", "content": "Rules."},
        {"role": "user", "content": [{"type": "input_text", "text": "Go"}]},
    ]
    opening = NemoGymServer(settings(tmp_path, url, asked(instructions="Be brief.", input=items))).reset(0)
    assert [(one.role, one.content) for one in opening.messages] == [
        ("system", "Be brief."), ("system", "Rules."), ("user", "Go"),
    ]  # fmt: skip
