"""Rewards, failures and limits of VitaBench's user and judge, with the real package against scripted endpoints."""

import json
import shutil
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from palimpsest.common.config.env_gateway import AdapterConfig
from palimpsest.common.environments.authoring.row_order import row_of
from palimpsest.common.environments.tool_calls import render
from palimpsest.common.sessions.sessions import SessionLimits, Sessions
from palimpsest.common.sessions.wire import CreateSession, Session, Status, Step, TakeStep, TextAction
from palimpsest.common.user_error import UserError
from palimpsest.services.env_gateway.adapters import entries
from palimpsest.services.env_gateway.processes.pool import Pool
from tests.servers import vita_models
from tests.servers.adapter_servers import folder_of
from tests.servers.chat_endpoint import Answer, ChatEndpoint, spoken
from tools.backends.checkouts import VITABENCH

pytestmark = [pytest.mark.asyncio, pytest.mark.long]
LIMITS = SessionLimits(max_sessions=64, lease_s=600.0, remember_s=60.0, result_bytes=65536)
USER_CALLS = 3
"""The first message, the answer to "Is that all?", and the end."""
REPLY_TOKENS = sum(vita_models.USAGE.values())
ONE_TOKEN = {"prompt_tokens": 1, "completion_tokens": 0}
"""Usage of the check at the start, which has the same limits."""


@pytest.fixture(autouse=True)
def packages(monkeypatch: pytest.MonkeyPatch) -> None:
    folder_of(VITABENCH)
    monkeypatch.setattr(sys, "path", [*sys.path, str(VITABENCH.library())])


def config(user: ChatEndpoint, judge: ChatEndpoint, **keys: Any) -> AdapterConfig:
    given = {
        "kind": "vitabench", "checkout": str(folder_of(VITABENCH)), "id": "delivery", "language": "english",
        "url": user.url, "user_model": "m", "judge_url": judge.url, "judge_model": "j",
    }  # fmt: skip
    return AdapterConfig.model_validate(given | keys)


@asynccontextmanager
async def opened(adapter: AdapterConfig) -> AsyncIterator[Sessions]:
    """The adapter in child processes, after the check at the start."""
    adapters = {"it": adapter}
    modules, variables = entries.modules(adapters), entries.variables(adapters)
    pool = Pool(limit=4, wait_s=60.0, call_limit_s=60.0, modules=modules, variables=variables)
    try:
        yield Sessions(entries.entries(pool, entries.specs(adapters, taken=())), LIMITS)
    finally:
        await pool.close()


async def begin(sessions: Sessions, seed: int = 0) -> Session:
    return Session.model_validate_json(await sessions.create(CreateSession(environment="it", seed=seed), None))


async def take(sessions: Sessions, session: Session, at: int, text: str) -> Step:
    taken = TakeStep(step=at, action=TextAction(type="text", text=text))
    return Step.model_validate_json(await sessions.step(session.session_id, taken))


async def ended(sessions: Sessions, texts: list[str], seed: int = 0) -> Step:
    """Return the last step of a session with these messages of the model."""
    session = await begin(sessions, seed)
    for at, text in enumerate(texts):
        step = await take(sessions, session, at, text)
        if step.status.is_terminal:
            break
    return step


def task(seed: int = 0) -> dict[str, Any]:
    tasks = json.loads((folder_of(VITABENCH) / "data/vita/domains/delivery/tasks_en.json").read_text())
    return dict(tasks[row_of(seed, len(tasks), 0)])


def solution() -> list[str]:
    return [*vita_models.orders(task()), "Is that all?", "Goodbye."]


async def test_the_judge_decides_the_reward() -> None:
    with ChatEndpoint(vita_models.user) as user, ChatEndpoint(vita_models.judge) as judge:
        async with opened(config(user, judge)) as sessions:
            user.requests.clear()
            judge.requests.clear()  # those of the check at the start
            right = await ended(sessions, solution())
            assert (right.status, right.reward, right.success) == (Status.TERMINATED, 1.0, True)
            assert len(user.requests) == USER_CALLS
            assert {request["model"] for request in user.requests} == {"m"}
            assert {request["model"] for request in judge.requests} == {"j"}
            assert {request["temperature"] for request in [*user.requests, *judge.requests]} == {0.0}
            assert task()["instructions"] in user.requests[0]["messages"][0]["content"]
            rubrics = {one["rubric"] for one in vita_models.rubrics(judge.requests[0])}
            assert rubrics >= set(task()["evaluation_criteria"]["overall_rubrics"])
            nothing = await ended(sessions, ["Is that all?", "Goodbye."])
            assert (nothing.status, nothing.reward, nothing.success) == (Status.TERMINATED, 0.0, False)
            judge.answer = vita_models.strict_judge
            refused = await ended(sessions, solution())
            assert (refused.status, refused.reward) == (Status.TERMINATED, 0.0)


async def test_the_model_may_end_the_task_and_an_empty_message_earns_0_without_the_judge() -> None:
    with ChatEndpoint(vita_models.user) as user, ChatEndpoint(vita_models.judge) as judge:
        async with opened(config(user, judge)) as sessions:
            stopped = await ended(sessions, [*vita_models.orders(task()), "###STOP###"])
            assert (stopped.status, stopped.reward) == (Status.TERMINATED, 1.0)
            judge.requests.clear()
            empty = await ended(sessions, [*vita_models.orders(task()), ""])
            assert (empty.status, empty.reward) == (Status.TERMINATED, 0.0)
            assert judge.requests == []


async def test_equal_actions_give_equal_orders_and_mistakes_are_replies() -> None:
    with ChatEndpoint(vita_models.user) as user, ChatEndpoint(vita_models.judge) as judge:
        async with opened(config(user, judge)) as sessions:
            first, second = await begin(sessions), await begin(sessions)
            order = vita_models.orders(task())[0]
            made = await take(sessions, first, 0, order)
            assert made == await take(sessions, second, 0, order)
            assert len(made.messages) == 1
            number = made.messages[0].content.partition("order_id:")[2].partition(",")[0]
            paid = await take(sessions, first, 1, render("pay_delivery_order", {"order_id": number}))
            assert [message.content for message in paid.messages] == ["Payment successful"]
            again = await take(sessions, first, 2, render("pay_delivery_order", {"order_id": number}))
            assert [message.content for message in again.messages] == ["Order is not in `unpaid` status."]
            unknown = await take(sessions, first, 3, render("pay_delivery_order", {"order_id": "none"}))
            assert [message.content for message in unknown.messages] == ["Error: Order none not found"]
            both = await take(sessions, first, 4, render("no_such_tool", {}) + order)
            assert [message.role for message in both.messages] == ["tool", "tool"]
            assert both.messages[0].content.startswith("Error: ")


async def test_the_places_of_expected_results_are_hidden(tmp_path: Path) -> None:
    """VitaBench looks an address up among all places that a thread ever made, also those of optional orders."""
    checkout = tmp_path / "vitabench"
    shutil.copytree(folder_of(VITABENCH) / "src", checkout / "src")
    changed = task()
    known = [[place["longitude"], place["latitude"]] for place in changed["environment"]["location"]]
    order = changed["evaluation_criteria"]["expected_states"][0]["required_orders"][0]
    hidden = {"address": "Zoologischer Garten", "longitude": 13.3, "latitude": 52.5}
    order = order | {"products": [], "location": hidden, "shipping_time": 0.0}
    changed["evaluation_criteria"]["expected_states"][0]["optional_orders"] = [order]
    folder = checkout / "data" / "vita" / "domains" / "delivery"
    folder.mkdir(parents=True)
    (folder / "tasks_en.json").write_text(json.dumps([changed]))
    with ChatEndpoint(vita_models.user) as user, ChatEndpoint(vita_models.judge) as judge:
        async with opened(config(user, judge, checkout=str(checkout))) as sessions:
            asked = render("address_to_longitude_latitude", {"address": hidden["address"]})
            found = (await take(sessions, await begin(sessions), 0, asked)).messages[0].content
    assert found.startswith("Error: ") or [float(one) for one in json.loads(found)] in known


def garbled(request: dict[str, Any]) -> Answer:
    return spoken("It went well." if vita_models.rubrics(request) else "yes", usage=vita_models.USAGE)


def partial(request: dict[str, Any]) -> Answer:
    met = [one | {"meetExpectation": True} for one in vita_models.rubrics(request)]
    return spoken(json.dumps(met[:-1]) if met else "yes", usage=vita_models.USAGE)


def broken(request: dict[str, Any]) -> Answer:
    return Answer(b"overloaded", status=500) if vita_models.rubrics(request) else spoken("yes")


def silent_user(request: dict[str, Any]) -> Answer:
    ends = request["messages"][-1]["content"] == "Goodbye."
    return Answer(b"overloaded", status=500) if ends else vita_models.user(request)


@pytest.mark.parametrize(
    ("user_answer", "judge_answer", "limits", "reason"),
    [
        (vita_models.user, broken, {}, "no usable reply in 3 attempts: status 500: overloaded"),
        (vita_models.user, garbled, {}, "the judge's reply is no list of"),
        (vita_models.user, partial, {}, "the judge gave no verdict on 1 of"),
        (vita_models.user, vita_models.judge, {"judge_tokens": REPLY_TOKENS - 1}, f"has used {REPLY_TOKENS} tokens"),
        (silent_user, vita_models.judge, {}, "no usable reply in 3 attempts: status 500: overloaded"),
        (vita_models.user, vita_models.judge, {"user_calls": USER_CALLS - 1}, f"has made {USER_CALLS - 1} requests"),
    ],
    ids=[
        "judge fails",
        "no verdicts",
        "a verdict is missing",
        "tokens of the judge",
        "user fails",
        "calls of the user",
    ],
)
async def test_without_a_user_or_a_judgement_there_is_no_reward(
    user_answer: Callable[[dict[str, Any]], Answer],
    judge_answer: Callable[[dict[str, Any]], Answer],
    limits: dict[str, Any],
    reason: str,
) -> None:
    with ChatEndpoint(vita_models.user) as user, ChatEndpoint(lambda _: spoken("yes", usage=ONE_TOKEN)) as judge:
        async with opened(config(user, judge, **limits)) as sessions:
            user.answer, judge.answer = user_answer, judge_answer
            step = await ended(sessions, solution())
    assert (step.status, step.reward) == (Status.ERROR, None)
    assert step.error is not None
    assert step.error.code == "environment_raised"
    assert reason in step.error.message


async def test_a_long_session_is_judged_in_windows_within_the_limit_of_requests() -> None:
    """Each window of 10 messages is a request; the last one without an order keeps the verdicts."""
    texts = [*vita_models.orders(task()), *["Is that all?"] * 8, "Goodbye."]
    with ChatEndpoint(vita_models.user) as user, ChatEndpoint(vita_models.judge) as judge:
        async with opened(config(user, judge, judge_calls=2)) as sessions:
            judge.requests.clear()
            step = await ended(sessions, texts)
            assert (step.status, step.reward) == (Status.ERROR, None)
            assert step.error is not None
            assert "has made 2 requests" in step.error.message
        async with opened(config(user, judge)) as sessions:
            judge.requests.clear()
            step = await ended(sessions, texts)
            assert (step.status, step.reward) == (Status.TERMINATED, 1.0)
            assert len(judge.requests) == 3


async def test_tokens_go_to_their_endpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OF_USER", "one")
    monkeypatch.setenv("OF_JUDGE", "two")
    with ChatEndpoint(vita_models.user) as user, ChatEndpoint(vita_models.judge) as judge:
        keys = {"token_variable": "OF_USER", "judge_token_variable": "OF_JUDGE"}
        async with opened(config(user, judge, **keys)) as sessions:
            assert (await ended(sessions, solution())).reward == 1.0
    assert set(user.tokens) == {"Bearer one"}
    assert set(judge.tokens) == {"Bearer two"}


async def test_the_language_is_that_of_tasks_tools_user_and_judge() -> None:
    with ChatEndpoint(vita_models.user) as user, ChatEndpoint(vita_models.judge) as judge:
        async with opened(config(user, judge, language="chinese")) as sessions:
            chinese = await begin(sessions)
        async with opened(config(user, judge)) as sessions:
            english = await begin(sessions)
    for session, expected in ((chinese, False), (english, True)):
        tool = next(tool for tool in session.tools if tool["function"]["name"] == "create_delivery_order")
        for text in (session.messages[0].content, tool["function"]["description"]):
            assert any("\u4e00" <= sign <= "\u9fff" for sign in text) is not expected
    assert [message.role for message in english.messages] == ["system", "assistant", "user"]


async def test_a_task_across_domains_has_the_tools_of_all(tmp_path: Path) -> None:
    """With data of the test: the copy of the checkout has no tasks across domains."""
    checkout = tmp_path / "vitabench"
    shutil.copytree(folder_of(VITABENCH) / "src", checkout / "src")
    folder = checkout / "data" / "vita" / "domains" / "cross_domain"
    folder.mkdir(parents=True)
    (folder / "tasks_en.json").write_text(json.dumps([task()]))
    with ChatEndpoint(vita_models.user) as user, ChatEndpoint(vita_models.judge) as judge:
        async with opened(config(user, judge)) as sessions:
            alone = {tool["function"]["name"] for tool in (await begin(sessions)).tools}
        across = config(user, judge, id="cross_domain", checkout=str(checkout))
        async with opened(across) as sessions:
            names = {tool["function"]["name"] for tool in (await begin(sessions)).tools}
            step = await ended(sessions, solution())
    assert alone < names
    assert {"create_hotel_order", "create_instore_product_order"} < names
    assert (step.status, step.reward) == (Status.TERMINATED, 1.0)


async def test_what_cannot_be_used_is_refused_with_a_sentence(tmp_path: Path) -> None:
    bare = tmp_path / "vitabench"
    shutil.copytree(folder_of(VITABENCH) / "src", bare / "src")
    folder = bare / "data" / "vita" / "domains" / "delivery"
    folder.mkdir(parents=True)
    (folder / "tasks_en.json").write_text(json.dumps([task() | {"evaluation_criteria": None}]))
    with ChatEndpoint(vita_models.user) as user, ChatEndpoint(vita_models.judge) as judge:
        dead = ChatEndpoint(vita_models.judge)
        dead.url = "http://127.0.0.1:9/v1"
        refused = (
            (config(user, judge, id="retail"), "no task set 'retail', only delivery, instore, ota, cross_domain"),
            (config(user, judge, id="instore", checkout=str(bare)), "the checkout lacks data of instore"),
            (config(user, judge, checkout=str(bare)), r"delivery \(english\) has no task with rubrics"),
            (config(user, dead), "the judge cannot be used: .* gave no usable reply"),
        )
        for adapter, problem in refused:
            with pytest.raises(UserError, match=f"env_gateway.adapters.it: .*{problem}"):
                async with opened(adapter):
                    pass
