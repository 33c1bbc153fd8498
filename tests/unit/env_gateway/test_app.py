"""HTTP interface of the gateway: status codes, bodies, limits, and the token."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from palimpsest.common.control.access import SERVICE_TOKEN
from palimpsest.common.control.credentials import open_access
from palimpsest.common.environments import lookup
from palimpsest.common.sessions import registry
from palimpsest.common.sessions.sessions import SessionLimits, Sessions
from palimpsest.services.env_gateway.app import create_app
from palimpsest.services.env_gateway.raw_routes import MAX_KEY

LIMITS = SessionLimits(max_sessions=2, lease_s=600.0, remember_s=600.0, result_bytes=65536)
WANTED = {"environment": "lookup", "seed": 3}
ACCESS = open_access({SERVICE_TOKEN: "secret"})


@asynccontextmanager
async def gateway(**options: Any) -> AsyncIterator[httpx.AsyncClient]:
    offered = registry.built_in()
    app = create_app(Sessions(offered, LIMITS), offered, **options)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://g") as client:
        yield client


def step(number: int, text: str) -> dict[str, Any]:
    return {"step": number, "action": {"type": "text", "text": text}}


def assert_error(reply: httpx.Response, status: int, code: str, *, retryable: bool = False) -> dict[str, Any]:
    body: dict[str, Any] = reply.json()
    assert (reply.status_code, body["code"], body["retryable"]) == (status, code, retryable)
    assert isinstance(body["message"], str)
    return body


async def test_a_gateway_that_a_person_drains_ends_after_its_last_session(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("palimpsest.services.env_gateway.session_lifespan.SWEEP_S", 0.001)
    drained = asyncio.Event()
    async with gateway(on_drained=drained.set) as client:
        session = f"/v1/sessions/{(await client.post('/v1/sessions', json=WANTED)).json()['session_id']}"
        reply = await client.post("/v1/actions/drain")
        assert (reply.status_code, reply.json()) == (202, {"kind": "drain", "state": "applied", "live": 1})
        assert_error(await client.post("/v1/sessions", json=WANTED), 503, "draining", retryable=True)
        for number, text in enumerate(lookup.solution(3)):
            assert not drained.is_set()
            assert (await client.post(f"{session}/step", json=step(number, text))).status_code == 200
        await drained.wait()


async def test_a_task_from_start_to_end() -> None:
    async with gateway() as client:
        created = await client.post("/v1/sessions", json=WANTED)
        assert created.status_code == 201
        session = f"/v1/sessions/{created.json()['session_id']}"
        call, answer = lookup.solution(3)
        reply = await client.post(f"{session}/step", json=step(0, call))
        assert (reply.status_code, reply.headers["content-type"]) == (200, "application/json")
        assert reply.json()["messages"] == [{"role": "tool", "content": "5"}]
        assert (await client.get(session)).json()["next_step"] == 1
        assert (await client.post(f"{session}/heartbeat")).json() == {"lease_expires_in_s": 600.0}
        last = (await client.post(f"{session}/step", json=step(1, answer))).json()
        assert last == {
            "step": 1, "status": "terminated", "messages": [], "reward": 1.0,
            "reward_parts": {"call": 0.3, "answer": 0.7}, "success": True, "error": None,
        }  # fmt: skip
        assert (await client.post(f"{session}/finalize")).json() == last
        assert [(await client.delete(session)).status_code for _ in range(2)] == [204, 204]
        assert (await client.get(session)).json()["status"] == "terminated"
        assert_error(await client.post(f"{session}/heartbeat"), 410, "gone")


async def test_parsed_tool_calls_and_plain_messages_are_actions_too() -> None:
    async with gateway() as client:
        session = f"/v1/sessions/{(await client.post('/v1/sessions', json=WANTED)).json()['session_id']}"
        calls = {"type": "tool_calls", "calls": [{"name": "lookup", "arguments": {"key": "basil"}}]}
        reply = await client.post(f"{session}/step", json={"step": 0, "action": calls})
        assert reply.json()["messages"] == [{"role": "tool", "content": "5"}]
        action = {"type": "message", "content": "5"}
        assert (await client.post(f"{session}/step", json={"step": 1, "action": action})).json()["reward"] == 1.0


async def test_environments_are_listed_and_described() -> None:
    async with gateway() as client:
        listed = (await client.get("/v1/envs")).json()["environments"]
        assert [entry["name"] for entry in listed] == [
            *("lookup", "hop", "add", "retail-mini", "retail-mini.test", "airline-mini", "airline-mini.test"),
            *("telecom-mini", "telecom-mini.test"),
        ]
        described = (await client.get("/v1/envs/lookup")).json()
        assert described == {
            "name": "lookup", "version": "1", "isolated": False,
            "description": "lookup: ask a table for a key's value, then answer with it. Two messages solve a task.",
        }  # fmt: skip
        assert_error(await client.get("/v1/envs/nothing"), 404, "unknown_environment")


async def test_every_error_has_the_same_body() -> None:
    async with gateway() as client:
        assert_error(await client.post("/v1/sessions", json={"environment": "nothing", "seed": 1}), 404,
                     "unknown_environment")  # fmt: skip
        assert_error(await client.get("/v1/sessions/unknown"), 404, "unknown_session")
        assert_error(await client.post("/v1/sessions/unknown/step", json=step(0, "")), 404, "unknown_session")
        assert_error(await client.get("/v1/nothing"), 404, "unknown_route")
        assert_error(await client.put("/v1/sessions"), 405, "wrong_method")
        session = f"/v1/sessions/{(await client.post('/v1/sessions', json=WANTED)).json()['session_id']}"
        assert assert_error(await client.post(f"{session}/step", json=step(1, "")), 409, "step_gap")["next_step"] == 0


@pytest.mark.parametrize(
    ("body", "names"),
    [
        (b"", "body"),
        (b"{", "body"),
        (b"[]", "body"),
        (b'{"environment": "lookup"}', "seed"),
        (b'{"environment": "lookup", "seed": "x"}', "seed"),
        (b'{"environment": "lookup", "seed": 1, "sed": 2}', "sed"),
        (b'{"environment": "../lookup", "seed": 1}', "environment"),
        (b'{"environment": "lookup", "seed": 1, "group": "\\ud800"}', "body"),
        (b"\xff", "body"),
    ],
)
async def test_an_invalid_request_is_a_422_that_names_the_field(body: bytes, names: str) -> None:
    async with gateway() as client:
        response = assert_error(await client.post("/v1/sessions", content=body), 422, "invalid_request")
        assert names in response["message"]


async def test_a_negative_step_and_an_unknown_action_are_422s() -> None:
    async with gateway() as client:
        session = f"/v1/sessions/{(await client.post('/v1/sessions', json=WANTED)).json()['session_id']}"
        for bad in (step(-1, ""), {"step": 0, "action": {"type": "shell", "text": "ls"}}, {"step": 0}):
            assert_error(await client.post(f"{session}/step", json=bad), 422, "invalid_request")


async def test_a_long_request_is_refused_with_and_without_a_content_length() -> None:
    async def parts() -> AsyncIterator[bytes]:
        for _ in range(3):
            yield b" " * 50

    async with gateway(request_limit_bytes=120) as client:
        assert_error(await client.post("/v1/sessions", content=b" " * 121), 413, "too_large")
        assert_error(await client.post("/v1/sessions", content=parts()), 413, "too_large")
        assert (await client.post("/v1/sessions", json=WANTED)).status_code == 201


async def test_a_full_gateway_answers_with_a_retry_time() -> None:
    async with gateway() as client:
        for _ in range(LIMITS.max_sessions):
            assert (await client.post("/v1/sessions", json=WANTED)).status_code == 201
        response = await client.post("/v1/sessions", json=WANTED)
        assert_error(response, 429, "capacity", retryable=True)
        assert response.headers["retry-after"] == "1"


async def test_the_idempotency_key_is_a_header_and_an_empty_one_does_not_count() -> None:
    async with gateway() as client:

        async def begun(key: str) -> str:
            reply = await client.post("/v1/sessions", json=WANTED, headers={"Idempotency-Key": key})
            return str(reply.json().get("session_id"))

        assert await begun("k") == await begun("k")
        assert await begun("") != await begun("k")
        long = {"Idempotency-Key": "k" * (MAX_KEY + 1)}
        assert_error(await client.post("/v1/sessions", json=WANTED, headers=long), 422, "invalid_request")


async def test_status_and_metrics_report_open_sessions() -> None:
    async with gateway() as client:
        await client.post("/v1/sessions", json=WANTED)
        status = (await client.get("/v1/status")).json()
        assert status["service"] == "env_gateway"
        assert (status["live_sessions"], status["sessions"]) == (1, {"running": 1})
        assert status["environments"] == {"lookup": {"running": 1}}
        assert 'palimpsest_gateway_live_sessions{environment="lookup"}' in (await client.get("/metrics")).text
        assert (await client.get("/readyz")).json() == {"ready": True, "waiting_for": None}


async def test_refusals_are_counted() -> None:
    async with gateway() as client:
        await client.get("/v1/sessions/unknown")
        assert 'palimpsest_gateway_refused_total{code="unknown_session"}' in (await client.get("/metrics")).text


ROUTES = [
    ("GET", "/v1/envs"), ("GET", "/v1/envs/lookup"), ("POST", "/v1/sessions"), ("GET", "/v1/sessions/x"),
    ("DELETE", "/v1/sessions/x"), ("POST", "/v1/sessions/x/step"), ("POST", "/v1/sessions/x/finalize"),
    ("POST", "/v1/sessions/x/heartbeat"), ("GET", "/v1/status"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "path"), ROUTES)
async def test_every_v1_route_needs_the_token(method: str, path: str) -> None:
    async with gateway(access=ACCESS) as client:
        for given in (None, "", "Bearer wrong", "Bearer ", "secret", "Basic secret", "Bearer secret2"):
            response = await client.request(method, path, headers={} if given is None else {"Authorization": given})
            assert_error(response, 401, "unauthorized")
            assert response.headers["www-authenticate"] == "Bearer"


async def test_with_the_token_the_gateway_answers_and_health_needs_none() -> None:
    async with gateway(access=ACCESS) as client:
        allowed = {"Authorization": "Bearer secret"}
        assert (await client.post("/v1/sessions", json=WANTED, headers=allowed)).status_code == 201
        assert (await client.get("/v1/status", headers=allowed)).status_code == 200
        for path in ("/healthz", "/readyz", "/metrics"):
            assert (await client.get(path)).status_code == 200


def test_openapi_describes_the_session_routes() -> None:
    offered = registry.built_in()
    paths = create_app(Sessions(offered, LIMITS), offered).openapi()["paths"]
    for method, path in ROUTES:
        documented = path.replace("/x", "/{session_id}").replace("envs/lookup", "envs/{name}")
        assert method.lower() in paths[documented]
    assert paths["/v1/sessions/{session_id}/step"]["post"]["requestBody"]["required"] is True
