"""Contract of the adapters against the real packages: MCP in `make test`, the others in `make test-long`.

The packages of the long tests lie in the cache, each in an environment of its own.
"""

import asyncio
import json
import random
import re
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import pytest_asyncio

from palimpsest.common.config.env_gateway import AdapterConfig, EnvGatewayConfig
from palimpsest.common.environments.authoring.row_order import row_of
from palimpsest.common.environments.tool_calls import render
from palimpsest.common.sessions.sessions import SessionLimits, Sessions
from palimpsest.common.sessions.wire import CreateSession, Session, Status, Step, TakeStep, TextAction
from palimpsest.common.user_error import UserError
from palimpsest.services.env_gateway.adapters import entries
from palimpsest.services.env_gateway.child_limits import child_limits
from palimpsest.services.env_gateway.processes.pool import Pool
from tests.servers import user_model, vita_models
from tests.servers.adapter_servers import (
    McpHttpServer,
    McpServer,
    NemoGymServer,
    OpenEnvServer,
    OrsServer,
    folder_of,
)
from tests.servers.chat_endpoint import ChatEndpoint
from tools.backends.checkouts import TAU2, VITABENCH
from tools.backends.packages import library

HERE = Path(__file__).parent / "adapters"
LIMITS = SessionLimits(max_sessions=64, lease_s=600.0, remember_s=60.0, result_bytes=65536)


@dataclass
class Subject:
    """An adapter with its server, and a policy that solves its tasks."""

    config: AdapterConfig
    solution: Callable[[str, int], list[str]]
    """The opening's last text, and the seed -> the model's messages."""
    kill: Callable[[], None] | None = None
    """Kills the server."""
    open_sessions: Callable[[], int] = lambda: 0
    """Sessions that the server holds."""
    path: list[str] = field(default_factory=list)
    seeds: range = range(40)
    """Of the sessions that repeat steps."""
    solves: bool = True
    """Whether `solution` earns 1 on every task."""


def number(text: str) -> int:
    return int(re.findall(r"\d+", text)[-1])


def sums(opening: str, _seed: int) -> list[str]:
    add = [render("add", {"number": 1})] * number(opening)
    return [*add, render("submit", {})]


@contextmanager
def mcp(folder: Path) -> Iterator[Subject]:
    server = McpServer(folder)
    config = AdapterConfig(kind="mcp", command=(sys.executable, str(HERE / "sums_mcp.py")), tasks="sums_tasks:Sums")
    yield Subject(
        config,
        lambda text, _: [*[render("add", {"number": 1})] * number(text), "done"],
        server.kill,
        server.count,
        seeds=range(4, 5),
    )


@contextmanager
def mcp_http(folder: Path) -> Iterator[Subject]:
    with McpHttpServer(folder) as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("MCP_TOKEN", "of-the-test")
        config = AdapterConfig(kind="mcp", url=f"{server.url}/mcp", tasks="sums_tasks:Sums", token_variable="MCP_TOKEN")
        yield Subject(
            config,
            lambda text, _: [*[render("add", {"number": 1})] * number(text), "done"],
            server.kill,
            server.count,
            seeds=range(4, 5),
        )


@contextmanager
def ors(folder: Path) -> Iterator[Subject]:
    with OrsServer(folder) as server:
        yield Subject(AdapterConfig(kind="ors", url=server.url), sums, server.kill, server.count)


@contextmanager
def openenv(folder: Path) -> Iterator[Subject]:
    with OpenEnvServer(folder) as server:
        yield Subject(AdapterConfig(kind="openenv", url=server.url), sums, server.kill, server.count)


@contextmanager
def nemo_gym(folder: Path) -> Iterator[Subject]:
    schema = {"type": "object", "properties": {"number": {"type": "integer"}}}
    tool = {"type": "function", "name": "add", "description": "", "parameters": schema, "strict": False}
    asked = [{"input": [{"role": "user", "content": f"Reach {n}."}], "tools": [tool]} for n in range(2, 10)]
    rows = [{"responses_create_params": one, "number": number(one["input"][0]["content"])} for one in asked]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with NemoGymServer(folder) as server:
        config = AdapterConfig(kind="nemo_gym", url=server.url, tasks=str(folder / "rows.jsonl"))
        yield Subject(config, lambda text, seed: [*sums(text, seed)[:-1], "done"], server.kill, server.count)


@contextmanager
def tau2(user: Literal["none", "scripted", "model"]) -> Iterator[Subject]:
    """The tasks of telecom that have data in the checkout, solved by the actions that they expect."""
    checkout = folder_of(TAU2)
    tasks = json.loads((checkout / "data/tau2/domains/telecom/tasks_small.json").read_text())

    def solution(_: str, seed: int) -> list[str]:
        task = tasks[row_of(seed, len(tasks), 0)]
        return [*(message_of(action) for action in task["evaluation_criteria"]["actions"]), *ending]

    def message_of(action: dict[str, Any]) -> str:
        alone = user == "none" or action["requestor"] == "assistant"
        if alone:
            return render(action["name"], action["arguments"])
        return user_model.asked(action["name"], action["arguments"] if user == "model" else None)

    ending = [render("done", {})] if user == "none" else ["Is that all?", "Goodbye."]
    with ChatEndpoint(user_model.answer) as endpoint:
        model = {"url": endpoint.url, "user_model": "m"} if user == "model" else {}
        config = AdapterConfig.model_validate(
            {"kind": "tau2", "checkout": str(checkout), "id": "telecom", "split": "small", "user": user, **model}
        )
        yield Subject(config, solution, path=[str(TAU2.library())], seeds=range(4, 8))


@contextmanager
def vitabench(_folder: Path) -> Iterator[Subject]:
    """The tasks of delivery, solved by the orders that they expect."""
    checkout = folder_of(VITABENCH)
    tasks = json.loads((checkout / "data/vita/domains/delivery/tasks_en.json").read_text())
    solution = lambda _, seed: [*vita_models.orders(tasks[row_of(seed, len(tasks), 0)]), "Goodbye."]  # noqa: E731
    with ChatEndpoint(vita_models.user) as user, ChatEndpoint(vita_models.judge) as judge:
        config = AdapterConfig(
            kind="vitabench", checkout=str(checkout), id="delivery", language="english", url=user.url, user_model="m",
            judge_url=judge.url, judge_model="j",
        )  # fmt: skip
        yield Subject(config, solution, path=[str(VITABENCH.library())], seeds=range(4, 8))


@contextmanager
def gymnasium(folder: Path) -> Iterator[Subject]:
    config = AdapterConfig(kind="gymnasium", id="sums_gymnasium:Sums-v0", reward_range=(-1.0, 1.0))
    yield Subject(config, lambda text, _: ["add"] * number(text) + ["submit"], path=[str(library("gymnasium==1.4.0"))])


@contextmanager
def textarena(folder: Path) -> Iterator[Subject]:
    config = AdapterConfig(kind="textarena", id="GuessTheNumber-v0-raw", reward_range=(-1.0, 1.0))
    yield Subject(
        config, lambda *_: [f"[{n}]" for n in range(1, 21)], solves=False, path=[str(library("textarena==0.7.4"))]
    )


@contextmanager
def skyrl_gym(folder: Path) -> Iterator[Subject]:
    rows = [{"prompt": f"What is {n} + 1?", "reward_spec": {"ground_truth": str(n + 1)}} for n in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = AdapterConfig(kind="skyrl_gym", id="gsm8k", tasks=str(folder / "rows.jsonl"))
    solution = lambda text, _: [f"It is #### {int(re.findall(r'[0-9]+', text)[0]) + 1}"]  # noqa: E731
    yield Subject(config, solution, path=[str(library("skyrl-gym==0.4.0"))])


pytestmark = pytest.mark.asyncio(loop_scope="module")

SUBJECTS = (
    pytest.param(mcp, id="mcp", marks=pytest.mark.servers),
    pytest.param(mcp_http, id="mcp_http", marks=pytest.mark.servers),
    *(
        pytest.param(one, id=one.__name__, marks=pytest.mark.long)
        for one in (ors, openenv, nemo_gym, vitabench, gymnasium, textarena, skyrl_gym)
    ),
    *(
        pytest.param(lambda _, user=user: tau2(user), id=f"tau2-{user}", marks=pytest.mark.long)
        for user in ("none", "scripted", "model")
    ),
)


@pytest.fixture(scope="module", params=SUBJECTS)
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
    with request.param(tmp_path_factory.mktemp("adapter")) as made:
        yield made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def sessions(subject: Subject) -> AsyncIterator[Sessions]:
    """The adapter in child processes."""
    adapters = {"it": subject.config}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(HERE), *sys.path, *subject.path])
        limits, _ = child_limits(EnvGatewayConfig(adapters=adapters))
        modules, variables = entries.modules(adapters), entries.variables(adapters)
        pool = Pool(limit=16, wait_s=60.0, call_limit_s=60.0, modules=modules, variables=variables, limits=limits)
        yield Sessions(entries.entries(pool, entries.specs(adapters, taken=())), LIMITS)
        await pool.close()


async def begin(sessions: Sessions, seed: int) -> Session:
    created = await sessions.create(CreateSession(environment="it", seed=seed), None)
    return Session.model_validate_json(created)


async def take(sessions: Sessions, session: Session, at: int, text: str) -> Step:
    taken = TakeStep(step=at, action=TextAction(type="text", text=text))
    return Step.model_validate_json(await sessions.step(session.session_id, taken))


async def play(sessions: Sessions, subject: Subject, seed: int, lost: random.Random | None = None) -> list[Step]:
    """Solve the task. lost: a third of the replies are lost and the steps repeated."""
    session = await begin(sessions, seed)
    steps: list[Step] = []
    for at, text in enumerate(subject.solution(session.messages[-1].content, seed)):
        steps.append(await take(sessions, session, at, text))
        while lost is not None and lost.random() < 1 / 3:
            assert await take(sessions, session, at, text) == steps[-1]
        assert all(message.role != "assistant" for message in steps[-1].messages)  # the model knows what it wrote
        if steps[-1].status.is_terminal:
            break
    return steps


async def test_a_solution_earns_1_alone_and_beside_another_session(sessions: Sessions, subject: Subject) -> None:
    alone = await play(sessions, subject, 1)
    together, other = await asyncio.gather(play(sessions, subject, 1), play(sessions, subject, 2))
    assert together == alone
    assert other[-1].status is Status.TERMINATED
    assert alone[-1].status is Status.TERMINATED
    assert alone[-1].reward == 1.0 or not subject.solves


async def test_a_repeated_step_is_applied_once(sessions: Sessions, subject: Subject) -> None:
    for seed in subject.seeds:
        steps = await play(sessions, subject, seed, random.Random(seed))
        assert steps[-1].reward == 1.0 if subject.solves else steps == await play(sessions, subject, seed)


async def test_a_seed_gives_the_same_task(sessions: Sessions) -> None:
    one, again, other = await begin(sessions, 3), await begin(sessions, 3), await begin(sessions, 4)
    assert one.messages == again.messages
    assert one.tools == again.tools
    assert one.initial_state_hash == again.initial_state_hash != other.initial_state_hash


async def test_no_session_is_left(sessions: Sessions, subject: Subject) -> None:
    finalized = await begin(sessions, 2)
    ended = Step.model_validate_json(await sessions.finalize(finalized.session_id))
    assert ended.status is Status.TRUNCATED
    assert ended.reward in (0.0, 0.5)  # 0.5 is a sum of 0 in [-1, 1]
    for session in sessions._ledger.live:
        sessions.close(session.id)
    while subject.open_sessions():  # children close their sessions
        await asyncio.sleep(0.05)


async def test_a_dead_server_gives_no_reward(sessions: Sessions, subject: Subject) -> None:
    """The last test of a subject, because it kills the server."""
    if subject.kill is None:
        return
    session = await begin(sessions, 1)
    await asyncio.to_thread(subject.kill)
    ended = await take(sessions, session, 0, subject.solution(session.messages[-1].content, 1)[0])
    assert (ended.status, ended.reward) == (Status.ERROR, None)
    assert ended.error is not None
    assert ended.error.code == "environment_raised"


CONFIGS = (
    ({"kind": "mcp"}, "kind 'mcp' needs the key `tasks`"),
    ({"kind": "mcp", "tasks": "sums_tasks:Sums"}, "kind 'mcp' needs either `command` or `url`"),
    ({"kind": "mcp", "tasks": "sums_tasks:Sums", "command": ("false",)}, "the MCP server .* cannot be reached"),
    ({"kind": "mcp", "tasks": "nowhere:Sums", "command": ("false",)}, "`tasks` nowhere:Sums cannot be imported"),
    (
        {"kind": "mcp", "tasks": "sums_tasks:Sums", "url": "http://127.0.0.1:9/mcp"},
        "the MCP server .* cannot be reached",
    ),
    ({"kind": "ors", "url": "http://127.0.0.1:9"}, "http://127.0.0.1:9 cannot be reached"),
    ({"kind": "openenv", "url": "http://127.0.0.1:9"}, "ws://127.0.0.1:9/ws cannot be reached"),
    ({"kind": "nemo_gym", "url": "http://127.0.0.1:9"}, "kind 'nemo_gym' needs the key `tasks`"),
    ({"kind": "tau2", "id": "retail", "user": "none"}, "kind 'tau2' needs the key `checkout`"),
    ({"kind": "vitabench", "id": "ota"}, "kind 'vitabench' needs the key `checkout`"),
    ({"kind": "vitabench", "id": "ota", "checkout": "a"}, "the simulated user of vitabench needs the keys `url` and"),
    (
        {"kind": "vitabench", "id": "ota", "checkout": "a", "url": "http://127.0.0.1:9", "user_model": "m"},
        "the judge of vitabench needs the keys `judge_url` and `judge_model`",
    ),
    ({"kind": "gymnasium", "id": "A-v0"}, r"No module named 'gymnasium'; install palimpsest\[gymnasium\]"),
    ({"kind": "textarena", "id": "A-v0"}, r"No module named 'textarena'; install palimpsest\[textarena\]"),
    ({"kind": "skyrl_gym", "id": "a", "tasks": "b"}, r"No module named 'skyrl_gym'; install palimpsest\[skyrl-gym\]"),
)


@pytest.mark.servers
async def test_what_cannot_be_used_is_refused_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(HERE))
    pool = Pool(limit=1, wait_s=60.0, call_limit_s=60.0)
    try:
        for config, problem in CONFIGS:
            with pytest.raises(UserError, match=f"env_gateway.adapters.it: .*{problem}"):
                entries.entries(pool, entries.specs({"it": AdapterConfig.model_validate(config)}, taken=()))
    finally:
        await pool.close()
