"""`palimpsest env serve`: its flags, and what it refuses. tests/contract/test_serving.py has the protocols."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from palimpsest.common.config.env_gateway import EnvGatewayConfig
from palimpsest.common.sessions.sessions import limits_of
from palimpsest.common.user_error import UserError
from palimpsest.env_serve import limits, parse, serve
from tests.processes.waiting import LIMIT_S

ROOT = Path(__file__).parents[2]


def test_the_flags_and_the_keys_of_a_run_are_read() -> None:
    request = parse(["hop", "--as", "ors", "--port=0", "--tasks", "7", "--host", "0.0.0.0"], {})
    assert (request.name, request.kind, request.config) == ("hop", "ors", None)
    assert (request.host, request.port, request.tasks) == ("0.0.0.0", 0, 7)
    run = str(ROOT / "examples" / "embedded.toml")
    config = parse(["hop", run, "--as=mcp", "--env_gateway.session_turns=9"], {}).config
    assert config is not None
    assert limits(config) == limits_of(config)
    assert limits(config).turns == 9


def test_without_a_run_file_the_limits_are_the_defaults() -> None:
    found, gateway = limits(None), EnvGatewayConfig()
    assert (found.turns, found.calls, found.result_bytes) == (
        gateway.session_turns, gateway.session_calls, gateway.result_limit_bytes
    )  # fmt: skip


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "usage: palimpsest env serve"),
        (("hop",), "usage: palimpsest env serve"),
        (("hop", "--as", "grpc"), "--as grpc: use openenv, mcp, ors"),
        (("hop", "--as=ors", "--port", "x"), "--port x: must be an integer from 0 to 65535"),
        (("hop", "--as=ors", "--tasks=0"), "--tasks 0: must be an integer from 1"),
        (("hop", "--as=ors", "--color=red"), "--color=red: there is no such flag"),
    ],
)
def test_a_wrong_command_line_is_refused(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        parse(words, {})


def test_another_address_than_loopback_needs_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PALIMPSEST_SERVICE_TOKEN", "PALIMPSEST_TOKENS_FILE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match=r"--host 0\.0\.0\.0: every client could use the environment"):
        serve(["hop", "--as", "ors", "--host", "0.0.0.0"])


def test_the_command_serves_until_a_signal() -> None:
    command = [sys.executable, "-m", "palimpsest", "env", "serve", "add", "--as", "ors", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            assert process.stdout is not None
            address = process.stdout.readline().strip().removeprefix("serving add as ors at ")
            assert httpx.get(f"{address}/list_environments", timeout=LIMIT_S).json() == ["add"]
            process.send_signal(signal.SIGTERM)
            assert process.wait(LIMIT_S) == 0
        finally:
            process.kill()
