"""Access to the gateway: addresses and tokens."""

from pathlib import Path

import pytest

from palimpsest.common.config import load
from palimpsest.common.sessions.token import VARIABLE, token
from palimpsest.common.user_error import UserError
from palimpsest.services.env_gateway.auth import is_loopback, require_token_off_loopback


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "localhost"])
def test_loopback_needs_no_token(host: str) -> None:
    assert is_loopback(host)
    require_token_off_loopback(host, None)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "10.0.0.1", "gateway.example", "localhost.example"])
def test_any_other_address_needs_a_token(host: str) -> None:
    with pytest.raises(UserError, match=VARIABLE):
        require_token_off_loopback(host, None)
    require_token_off_loopback(host, "secret")


def test_the_token_is_read_without_the_newline_of_a_secret_file() -> None:
    assert token({VARIABLE: "secret\n"}) == "secret"
    assert token({VARIABLE: ""}) is None
    assert token({}) is None


@pytest.mark.parametrize("bad", ["two words", "naïve", "a\nb"])
def test_a_token_that_is_invalid_in_a_header_is_refused(bad: str) -> None:
    with pytest.raises(UserError, match=VARIABLE):
        token({VARIABLE: bad})


def test_the_tokens_variable_is_not_read_as_a_key_of_the_run(tmp_path: Path) -> None:
    run = tmp_path / "run.toml"
    run.write_text('model.path = "m"\ntasks.environments = { lookup = 1.0 }\nlearner.versions = 1\n')
    assert load([str(run)], {VARIABLE: "secret"}, program="x").config.learner.versions == 1
