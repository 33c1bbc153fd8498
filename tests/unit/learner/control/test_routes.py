"""Control of the learner over HTTP: roles, replies and errors."""

import asyncio
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry

from palimpsest.common.config.schema import RunConfig
from palimpsest.common.control.access import Access, Role, Token, digest
from palimpsest.common.control.changes import ChangeState
from palimpsest.common.control.desk import ControlDesk
from palimpsest.common.service import application
from palimpsest.services.learner.control.routes import RULES, control_routes
from palimpsest.services.learner.control.run_control import CurrentSettings

LR = "learner.optimizer.lr"
CONFIG = RunConfig.model_validate(
    {
        "model": {"path": "m"},
        "tasks": {"environments": {"lookup": 1.0}},
        "learner": {"versions": 3, "proximal": {"kind": "current_recompute"}},
    }
)


class Parts:
    def __init__(self, *, cuts: bool = False) -> None:
        self.desk = ControlDesk("c", clock=iter(range(1000)).__next__)
        self.current = CurrentSettings(CONFIG, generation=4)
        tokens = [Token(role.value, role, digest(role.value.encode())) for role in Role]
        self.app = application(
            "learner",
            registry=CollectorRegistry(),
            ready=lambda: None,
            status=dict,
            access=Access(lambda: tokens),
            rules=RULES,
        )
        self.app.include_router(control_routes(self.desk, lambda: self.current, cuts=cuts))

    async def send(self, method: str, path: str, role: str = "tune", **options: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {role}"} | options.pop("headers", {})
        async with httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://t") as client:
            return await client.request(method, path, headers=headers, **options)


@pytest.fixture
def parts() -> Parts:
    return Parts()


async def test_settings_have_their_generation_as_entity_tag(parts: Parts) -> None:
    reply = await parts.send("GET", "/v1/settings", "view")
    assert (reply.status_code, reply.headers["etag"]) == (200, '"4"')
    assert reply.json()["settings"][LR] == 1e-6
    assert reply.json()["applies_from"]["sampling.temperature"] == "groups offered from then on"


async def test_a_change_is_accepted_with_the_name_of_its_token(parts: Parts) -> None:
    reply = await parts.send("PATCH", "/v1/settings", json={LR: 1e-4})
    assert reply.status_code == 202
    assert (reply.json()["change"], reply.json()["state"], reply.json()["applies_from"]) == (
        "c1",
        "requested",
        "next version",
    )
    (change,) = parts.desk.take()
    assert (change.caller.name, change.caller.role, change.what) == ("tune", "tune", {LR: 1e-4})


async def test_a_request_may_wait_for_the_outcome(parts: Parts) -> None:
    waiting = asyncio.create_task(parts.send("POST", "/v1/actions/checkpoint", "operate", params={"wait_s": 30}))
    while not (taken := parts.desk.take()):
        await asyncio.sleep(0)
    parts.desk.finish(taken[0], ChangeState.APPLIED, version=7, result={"nothing_new": True})
    reply = await waiting
    assert (reply.status_code, reply.json()["state"], reply.json()["result"]) == (200, "applied", {"nothing_new": True})


@pytest.mark.parametrize(
    ("method", "path", "role", "options", "status", "code"),
    [
        ("PATCH", "/v1/settings", "operate", {"json": {LR: 1e-4}}, 403, "forbidden"),
        ("POST", "/v1/actions/pause", "view", {}, 403, "forbidden"),
        ("POST", "/v1/actions/stop", "service", {}, 403, "forbidden"),
        ("PATCH", "/v1/settings", "tune", {"json": {}}, 422, "invalid_request"),
        ("PATCH", "/v1/settings", "tune", {"json": [1]}, 422, "invalid_request"),
        ("PATCH", "/v1/settings", "tune", {"json": {LR: "fast"}}, 422, "invalid_value"),
        ("PATCH", "/v1/settings", "tune", {"json": {"learner.lr": 1}}, 422, "unknown_setting"),
        ("PATCH", "/v1/settings", "tune", {"json": {"model.path": "other"}}, 422, "needs_new_run"),
        ("PATCH", "/v1/settings", "tune", {"json": {"learner.audit.fraction": 1.0}}, 422, "needs_new_run"),
        ("PATCH", "/v1/settings", "tune", {"json": {LR: 1}, "headers": {"If-Match": '"3"'}}, 412, "other_generation"),
        ("POST", "/v1/actions/pause", "operate", {"json": {"what": "all"}}, 422, "invalid_request"),
        ("POST", "/v1/actions/pause", "operate", {"params": {"wait_s": "nan"}}, 422, "invalid_request"),
        ("POST", "/v1/actions/cut", "operate", {}, 409, "no_cut"),
        ("GET", "/v1/changes/none", "view", {}, 404, "unknown_change"),
        ("GET", "/v1/changes", "view", {"params": {"limit": 0}}, 422, "invalid_request"),
    ],
)
async def test_a_request_that_cannot_be_met_changes_nothing(
    parts: Parts, method: str, path: str, role: str, options: dict[str, Any], status: int, code: str
) -> None:
    reply = await parts.send(method, path, role, **options)
    assert (reply.status_code, reply.json()["code"]) == (status, code)
    assert set(reply.json()) == {"code", "message", "retryable"}
    assert parts.desk.take() == []


async def test_the_present_generation_permits_a_change(parts: Parts) -> None:
    reply = await parts.send("PATCH", "/v1/settings", json={LR: 1e-4}, headers={"If-Match": '"4"'})
    assert reply.status_code == 202


async def test_a_repeated_request_is_one_change(parts: Parts) -> None:
    for _ in range(2):
        reply = await parts.send("POST", "/v1/actions/pause", headers={"Idempotency-Key": "k"})
        assert reply.json()["change"] == "c1"
    reply = await parts.send("POST", "/v1/actions/resume", headers={"Idempotency-Key": "k"})
    assert (reply.status_code, reply.json()["code"]) == (409, "key_conflict")
    assert len(parts.desk.take()) == 1


async def test_a_run_with_cuts_can_be_cut() -> None:
    parts = Parts(cuts=True)
    assert (await parts.send("POST", "/v1/actions/cut", "operate")).status_code == 202
    assert [change.kind for change in parts.desk.take()] == ["cut"]


async def test_a_learner_that_was_replaced_refuses_changes(parts: Parts) -> None:
    parts.desk.close("fenced", "another learner took over this run")
    reply = await parts.send("POST", "/v1/actions/pause")
    assert (reply.status_code, reply.json()["code"]) == (409, "fenced")


async def test_the_list_of_changes(parts: Parts) -> None:
    await parts.send("POST", "/v1/actions/pause", json={"what": "offers"})
    await parts.send("PATCH", "/v1/settings", json={LR: 1e-4})
    reply = await parts.send("GET", "/v1/changes", "view")
    assert [(change["change"], change["kind"]) for change in reply.json()["changes"]] == [
        ("c1", "pause"),
        ("c2", "settings"),
    ]
    assert (await parts.send("GET", "/v1/changes/c2", "view")).json()["what"] == {LR: 1e-4}
