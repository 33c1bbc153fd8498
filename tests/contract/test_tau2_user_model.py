"""Limits of the user's model of tau2-bench, which also judges, with the real package against a scripted endpoint."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from palimpsest.common.config.env_gateway import AdapterConfig
from palimpsest.common.sessions.sessions import SessionLimits, Sessions
from palimpsest.common.sessions.wire import CreateSession, Session, Status, Step, TakeStep, TextAction
from palimpsest.services.env_gateway.adapters import entries
from palimpsest.services.env_gateway.processes.pool import Pool
from tests.servers import user_model
from tests.servers.adapter_servers import folder_of
from tests.servers.chat_endpoint import Answer, ChatEndpoint
from tools.backends.checkouts import TAU2

pytestmark = [pytest.mark.asyncio, pytest.mark.long]
LIMITS = SessionLimits(max_sessions=64, lease_s=600.0, remember_s=60.0, result_bytes=65536)
CALLS = 5
"""Greeting, the use of a tool, its result, the end, and the judgement."""
TOKENS = CALLS * sum(user_model.USAGE.values())


def broken_judge(request: dict[str, Any]) -> Answer:
    judges = "expectedOutcomes" in (request["messages"][-1]["content"] or "")
    return Answer(b"overloaded", status=500) if judges else user_model.answer(request)


@pytest.fixture
def actions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The actions of the only task, of telecom, in data of the test, where a judge decides too."""
    checkout = folder_of(TAU2)
    monkeypatch.setattr(sys, "path", [*sys.path, str(TAU2.library())])
    monkeypatch.setenv("TAU2_DATA_DIR", str(tmp_path))
    shutil.copytree(checkout / "data" / "tau2", tmp_path / "tau2", ignore=shutil.ignore_patterns("results"))
    path = tmp_path / "tau2" / "domains" / "telecom" / "tasks_small.json"
    tasks = json.loads(path.read_text())
    task = next(one for one in tasks if [a["requestor"] for a in one["evaluation_criteria"]["actions"]] == ["user"])
    task["evaluation_criteria"]["reward_basis"] = ["ENV_ASSERTION", "NL_ASSERTION"]
    task["evaluation_criteria"]["nl_assertions"] = ["it"]
    path.with_name("tasks.json").write_text(json.dumps([task]))
    path.with_name("split_tasks.json").write_text(json.dumps({"small": [task["id"]]}))
    return list(task["evaluation_criteria"]["actions"])


async def ended(endpoint: ChatEndpoint, actions: list[dict[str, Any]], limits: dict[str, Any]) -> Step:
    """Return the last step of a session that solves the task."""
    adapters = {
        "it": AdapterConfig.model_validate(
            {
                "kind": "tau2",
                "checkout": str(folder_of(TAU2)),
                "id": "telecom",
                "split": "small",
                "user": "model",
                "user_model": "m",
                "url": endpoint.url,
                **limits,
            }
        )
    }
    variables = ("TAU2_DATA_DIR",)
    pool = Pool(limit=2, wait_s=60.0, call_limit_s=60.0, modules=entries.modules(adapters), variables=variables)
    try:
        sessions = Sessions(entries.entries(pool, entries.specs(adapters, taken=())), LIMITS)
        endpoint.requests.clear()  # those of the check at the start
        created = await sessions.create(CreateSession(environment="it", seed=0), None)
        session = Session.model_validate_json(created)
        texts = [user_model.asked(action["name"], action["arguments"]) for action in actions]
        for at, text in enumerate([*texts, "Goodbye."]):
            taken = TakeStep(step=at, action=TextAction(type="text", text=text))
            step = Step.model_validate_json(await sessions.step(session.session_id, taken))
            if step.status.is_terminal:
                break
        return step
    finally:
        await pool.close()


async def test_within_its_limits_a_session_is_scored(actions: list[dict[str, Any]]) -> None:
    with ChatEndpoint(user_model.answer) as endpoint:
        step = await ended(endpoint, actions, {"user_calls": CALLS, "user_tokens": TOKENS})
    assert (step.status, step.reward) == (Status.TERMINATED, 1.0)
    assert len(endpoint.requests) == CALLS
    assert "expectedOutcomes" in endpoint.requests[-1]["messages"][-1]["content"]
    assert {request["model"] for request in endpoint.requests} == {"m"}


@pytest.mark.parametrize(
    ("answer", "limits", "reason", "requests"),
    [
        (user_model.answer, {"user_calls": CALLS - 1}, f"has made {CALLS - 1} requests", CALLS - 1),
        (user_model.answer, {"user_tokens": TOKENS - 1}, f"has used {TOKENS} tokens", CALLS),
        (broken_judge, {}, "no usable reply in 3 attempts: status 500: overloaded", CALLS + 2),
    ],
    ids=["requests", "tokens", "endpoint"],
)
async def test_without_a_judgement_there_is_no_reward(
    actions: list[dict[str, Any]],
    answer: Callable[[dict[str, Any]], Answer],
    limits: dict[str, Any],
    reason: str,
    requests: int,
) -> None:
    with ChatEndpoint(answer) as endpoint:
        step = await ended(endpoint, actions, limits)
    assert (step.status, step.reward) == (Status.ERROR, None)
    assert step.error is not None
    assert step.error.code == "environment_raised"
    assert reason in step.error.message
    assert len(endpoint.requests) == requests
