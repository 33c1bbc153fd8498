"""Every route of every service: without a token it answers 401, with a wrong role 403; open routes need no token."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.routing import Route

from palimpsest.common.control.access import METRICS_TOKEN, OPEN, TOKENS_FILE, Role, token_line
from palimpsest.common.control.credentials import open_access
from tests.contract.http_services import APPS

VIEWED = {("GET", "/v1/status"), ("GET", "/docs"), ("GET", "/openapi.json"), ("GET", "/metrics"),
          ("GET", "/v1/envs"), ("GET", "/v1/envs/{name}"), ("GET", "/docs/oauth2-redirect")}  # fmt: skip
VIEWED |= {("GET", "/v1/settings"), ("GET", "/v1/changes"), ("GET", "/v1/changes/{change}")}
VIEWED |= {
    ("GET", f"/v1/{path}") for path in ("waits", "points", "batches", "batches/{version}", "batches/{version}/{row}")
}
OPERATED = {("DELETE", "/v1/sessions/{session_id}")}


def routes(app: FastAPI) -> Iterator[tuple[str, str]]:
    for route in app.routes:
        assert isinstance(route, APIRoute | Route)
        yield from ((method, route.path) for method in sorted((route.methods or set()) - {"HEAD"}))


CASES = [(name, *route) for name, create in APPS.items() for route in routes(create(None, Path()))]


@pytest.fixture(scope="module")
def apps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, FastAPI]:
    folder = tmp_path_factory.mktemp("access")
    file = folder / "tokens"
    file.write_text("\n".join(token_line(role, role, role) for role in Role))
    access = open_access({TOKENS_FILE: str(file), METRICS_TOKEN: "scrape"})
    return {name: create(access, folder / name) for name, create in APPS.items()}


def test_the_walk_has_every_service_and_its_routes() -> None:
    assert {name for name, _, _ in CASES} == set(APPS)
    assert {
        ("store", "POST", "/v1/writers"),
        ("gateway", "POST", "/v1/sessions"),
        ("learner", "GET", "/v1/status"),
    } < set(CASES)
    assert len(CASES) > 40


@pytest.mark.parametrize(("service", "method", "path"), CASES)
async def test_a_stranger_and_a_wrong_role_are_refused(
    apps: dict[str, FastAPI], service: str, method: str, path: str
) -> None:
    transport = httpx.ASGITransport(apps[service], raise_app_exceptions=False)
    answers = {}
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
        for token in (None, "wrong", *Role):
            headers = {"Authorization": f"Bearer {token}"} if token else {}
            reply = await client.request(method, path, headers=headers)
            answers[token] = reply.status_code
            if reply.status_code in (401, 403):
                assert set(reply.json()) == {"code", "message", "retryable"}
    if path in OPEN:
        assert set(answers.values()) <= {200, 503}  # 503: the service is not ready
        return
    assert (answers[None], answers["wrong"]) == (401, 401)
    permitted = {Role.SERVICE}
    if (method, path) in VIEWED:
        permitted = set(Role)
    if (method, path) in OPERATED:
        permitted |= {Role.OPERATE, Role.TUNE}
    if path.startswith("/v1/actions/"):
        permitted = {Role.OPERATE, Role.TUNE}
    if path.startswith("/v1/pins"):
        permitted = set(Role) if method == "GET" else {Role.OPERATE, Role.TUNE, Role.SERVICE}
    if (method, path) == ("PATCH", "/v1/settings"):
        permitted = {Role.TUNE}
    assert {role for role in Role if answers[role] not in (401, 403)} == permitted
