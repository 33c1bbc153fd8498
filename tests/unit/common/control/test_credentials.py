"""Secrets from variables and files, and a tokens file that changes."""

from pathlib import Path

import pytest

from palimpsest.common.config import load
from palimpsest.common.control.access import METRICS_TOKEN, SERVICE_TOKEN, TOKENS_FILE, Role, digest, token_line
from palimpsest.common.control.credentials import LOOK_S, TokensFile, authorization, open_access, secret
from palimpsest.common.user_error import UserError
from tests.unit.env_gateway.fakes import ManualClock

FILE = SERVICE_TOKEN + "_FILE"


def test_a_secret_comes_from_its_variable_or_its_file_without_the_newline(tmp_path: Path) -> None:
    (file := tmp_path / "token").write_text("from-file\n")
    assert secret({SERVICE_TOKEN: "direct\n"}, SERVICE_TOKEN) == "direct"
    assert secret({FILE: str(file)}, SERVICE_TOKEN) == "from-file"
    assert secret({SERVICE_TOKEN: ""}, SERVICE_TOKEN) is None
    assert authorization({FILE: str(file)}) == {"Authorization": "Bearer from-file"}
    assert authorization({}) == {}


@pytest.mark.parametrize("bad", ["two words", "naïve", "a\nb", "x" * 513])
def test_a_secret_that_is_invalid_in_a_header_is_refused(bad: str) -> None:
    with pytest.raises(UserError, match=SERVICE_TOKEN):
        secret({SERVICE_TOKEN: bad}, SERVICE_TOKEN)


def test_a_secret_that_cannot_be_read_is_refused_with_its_variable(tmp_path: Path) -> None:
    (empty := tmp_path / "empty").write_text("\n")
    for environment, problem in [
        ({FILE: str(tmp_path / "none")}, "cannot be read"),
        ({FILE: str(empty)}, "is empty"),
        ({FILE: str(empty), SERVICE_TOKEN: "x"}, "are both set"),
        ({"PALIMPSEST_GATEWAY_TOKEN": "x"}, "was replaced by PALIMPSEST_SERVICE_TOKEN"),
    ]:
        with pytest.raises(UserError, match=problem):
            authorization(environment)


def test_the_service_token_alone_gives_the_role_service(tmp_path: Path) -> None:
    access = open_access({SERVICE_TOKEN: "shared"})
    assert access.tokens is not None
    assert [(one.role, one.digest) for one in access.tokens()] == [(Role.SERVICE, digest(b"shared"))]
    assert open_access({}).tokens is None


def test_the_tokens_file_replaces_the_service_token(tmp_path: Path) -> None:
    (file := tmp_path / "tokens").write_text(token_line("ann", "view", "a"))
    access = open_access({TOKENS_FILE: str(file), SERVICE_TOKEN: "shared", METRICS_TOKEN: "scrape"})
    assert access.tokens is not None
    assert [one.name for one in access.tokens()] == ["ann"]
    assert access.metrics == digest(b"scrape")


def test_a_changed_tokens_file_is_read_again_and_an_invalid_one_changes_nothing(tmp_path: Path) -> None:
    (file := tmp_path / "tokens").write_text(token_line("ann", "view", "a"))
    clock = ManualClock()
    tokens = TokensFile(file, clock=clock)

    def after(text: str | None) -> list[str]:
        if text is None:
            file.unlink()
        else:
            file.write_text(text)
        clock.now += LOOK_S
        return [one.name for one in tokens.tokens()]

    assert after(token_line("robert", "tune", "b")) == ["robert"]
    assert after("robert tune") == ["robert"]
    assert after(None) == ["robert"]
    assert after("") == []
    assert after(token_line("ann", "view", "a")) == ["ann"]


def test_a_tokens_file_without_a_token_is_refused_at_the_start(tmp_path: Path) -> None:
    (file := tmp_path / "tokens").write_text("# no names\n")
    for path, problem in [(file, "has no token"), (tmp_path / "none", "cannot be read")]:
        with pytest.raises(UserError, match=problem):
            TokensFile(path)


@pytest.mark.parametrize("name", [SERVICE_TOKEN, FILE, METRICS_TOKEN, TOKENS_FILE])
def test_the_variables_are_not_read_as_keys_of_the_run(tmp_path: Path, name: str) -> None:
    run = tmp_path / "run.toml"
    run.write_text('model.path = "m"\ntasks.environments = { lookup = 1.0 }\nlearner.versions = 1\n')
    assert load([str(run)], {name: "secret"}, program="x").config.learner.versions == 1
