"""The script of `helm test` against a real server."""

import importlib.util
from types import ModuleType

import pytest
from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from palimpsest.common.service import Server, application
from tests.deploy.conftest import CHART


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_services", CHART / "files" / "check_services.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def app(waiting_for: str | None) -> FastAPI:
    return application("store", registry=CollectorRegistry(), ready=lambda: waiting_for, status=dict)


def test_it_waits_until_a_service_is_ready(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with Server(app("the log"), "127.0.0.1", 0, key="store") as server:
        monkeypatch.setattr(script.time, "sleep", lambda _seconds: server.show(app(None)))
        url = f"http://127.0.0.1:{server.port}/readyz"
        assert script.main(60, [url]) == 0
    assert capsys.readouterr().out == f"{url}: ready\n"


def test_it_fails_with_the_reason_of_the_service(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with Server(app("the log"), "127.0.0.1", 0, key="store") as server:
        assert script.main(0, [f"http://127.0.0.1:{server.port}/readyz"]) == 1
    assert 'status 503: {"ready":false,"waiting_for":"the log"}' in capsys.readouterr().out


def test_it_fails_if_nothing_listens(script: ModuleType) -> None:
    with Server(app(None), "127.0.0.1", 0, key="store") as server:
        url = f"http://127.0.0.1:{server.port}/readyz"
    assert script.main(0, [url]) == 1
