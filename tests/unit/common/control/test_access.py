"""Decisions about requests: tokens files, roles, addresses and Host headers."""

import hashlib

import pytest
from blake3 import blake3

from palimpsest.common.control.access import (
    COMMON_RULES,
    Access,
    AccessRule,
    Role,
    Token,
    digest,
    find_token,
    includes,
    is_loopback,
    parse_tokens,
    require_token_off_loopback,
    token_line,
)
from palimpsest.common.control.errors import HttpError
from palimpsest.common.user_error import UserError

LINE = f"ann view {blake3(b'secret').hexdigest()}"


def access(*tokens: Token, hosts: frozenset[str] | None = None, metrics: str | None = None) -> Access:
    return Access(lambda: tokens, metrics=metrics, hosts=hosts)


def refused(
    by: Access, method: str, path: str, *headers: tuple[bytes, bytes], rules: tuple[AccessRule, ...] = ()
) -> int:
    """Status of the refusal, or 200."""
    try:
        by.check(method, path, [(b"host", b"store:80"), *headers], (*rules, *COMMON_RULES))
    except HttpError as error:
        return error.status
    return 200


def sent(token: str) -> tuple[bytes, bytes]:
    return b"authorization", f"Bearer {token}".encode()


def test_a_tokens_file_has_a_name_a_role_and_a_digest_a_line() -> None:
    assert parse_tokens(f"# people\n\n{LINE}\n", "f") == (Token("ann", Role.VIEW, blake3(b"secret").hexdigest()),)
    assert token_line("ann", "view", "secret") == LINE


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("ann view", "f, line 1: expected `name role blake3-hex`, got 2 fields"),
        (f"ann root {'0' * 64}", "f, line 1: there is no role 'root'; it can be view, operate, tune, service"),
        (f"a/b view {'0' * 64}", "f, line 1: 'a/b' is not a name"),
        ("ann view secret", "f, line 1: the third field must be the blake3 of the token"),
        (f"ann view {hashlib.sha256().hexdigest().upper()}", "f, line 1: the third field must be the blake3"),
        ("\n".join([LINE] * 3), "f: ann has 3 tokens; a name has at most 2"),
    ],
)
def test_an_invalid_tokens_file_is_refused_with_its_line(line: str, problem: str) -> None:
    with pytest.raises(UserError) as error:
        parse_tokens(line, "f")
    assert str(error.value).startswith(problem)


def test_a_name_may_have_two_live_tokens() -> None:
    tokens = parse_tokens("\n".join(token_line("ann", "tune", one) for one in ("old", "new")), "f")
    assert [find_token(tokens, one) for one in (b"old", b"new", b"other")] == [*tokens, None]


def test_roles_include_the_ones_before_them_and_service_includes_view_only() -> None:
    table = {held: [needed.value for needed in Role if includes(held, needed)] for held in Role}
    assert table == {
        Role.VIEW: ["view"],
        Role.OPERATE: ["view", "operate"],
        Role.TUNE: ["view", "operate", "tune"],
        Role.SERVICE: ["view", "service"],
    }


TOKENS = tuple(Token(role.value, role, digest(role.value.encode())) for role in Role)


@pytest.mark.parametrize(
    ("method", "path", "permitted"),
    [
        ("GET", "/v1/status", {"view", "operate", "tune", "service"}),
        ("POST", "/v1/status", {"service"}),
        ("POST", "/v1/writers", {"service"}),
        ("GET", "/nothing", {"service"}),
        ("DELETE", "/v1/sessions/x", {"operate", "tune", "service"}),
        ("GET", "/metrics", {"none", "view", "operate", "tune", "service"}),
        ("GET", "/healthz", {"none", "view", "operate", "tune", "service"}),
        ("GET", "/healthz/", {"service"}),
    ],
)
def test_each_route_needs_its_role(method: str, path: str, permitted: set[str]) -> None:
    rules = (AccessRule("DELETE", "/v1/sessions/", (Role.SERVICE, Role.OPERATE)),)
    by = access(*TOKENS)
    answers = {role: refused(by, method, path, sent(role), rules=rules) for role in [*Role]}
    answers |= {"none": refused(by, method, path, rules=rules), "wrong": refused(by, method, path, sent("x"))}
    expected = {role: 200 if role in permitted else 403 for role in Role}
    open_to_all = "none" in permitted
    assert answers == expected | {"none": 200 if open_to_all else 401, "wrong": 200 if open_to_all else 401}


@pytest.mark.parametrize(
    "value", [b"", b"Bearer", b"Bearer ", b"service", b"Basic service", b"Bearer  service", b"Bearer " + b"x" * 600]
)
def test_a_malformed_authorization_is_a_401(value: bytes) -> None:
    assert refused(access(*TOKENS), "GET", "/v1/status", (b"authorization", value)) == 401


def test_two_authorization_headers_are_a_401() -> None:
    assert refused(access(*TOKENS), "GET", "/v1/status", sent("service"), sent("service")) == 401


def test_a_metrics_token_closes_only_the_metrics() -> None:
    by = Access(None, metrics=digest(b"scrape"))
    assert refused(by, "GET", "/metrics") == 401
    assert refused(by, "GET", "/metrics", sent("scrape")) == 200
    assert refused(by, "GET", "/v1/status") == 200
    with_tokens = access(*TOKENS, metrics=digest(b"scrape"))
    assert [refused(with_tokens, "GET", "/metrics", sent(one)) for one in ("scrape", "view", "x")] == [200, 200, 401]
    assert refused(with_tokens, "GET", "/v1/status", sent("scrape")) == 401


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:8000", 200), ("127.0.0.1:8000", 200), ("[::1]:8000", 200), ("10.1.2.3", 200), ("STORE:80", 200),
        ("evil.example", 403), ("127.0.0.1.evil.example", 403), ("localhost@evil", 403), ("", 403),
    ],
)  # fmt: skip
def test_without_tokens_a_web_page_cannot_reach_a_service_under_a_name_of_its_own(host: str, status: int) -> None:
    by = Access(None, hosts=frozenset({"localhost", "store"}))
    try:
        by.check("GET", "/v1/status", [(b"host", host.encode())], COMMON_RULES)
        answer = 200
    except HttpError as error:
        answer = error.status
    assert answer == status


@pytest.mark.parametrize("hosts", [[], [b"a", b"b"], [b"a b"]])
def test_with_tokens_one_valid_host_header_is_required(hosts: list[bytes]) -> None:
    with pytest.raises(HttpError) as error:
        access(*TOKENS).check("GET", "/healthz", [(b"host", host) for host in hosts], COMMON_RULES)
    assert (error.value.status, error.value.body["code"]) == (403, "wrong_host")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "localhost"])
def test_loopback_needs_no_token(host: str) -> None:
    assert is_loopback(host)
    require_token_off_loopback(host, None, key="learner")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "10.0.0.1", "gateway.example", "localhost.example"])
def test_any_other_address_needs_a_token(host: str) -> None:
    for nothing in (None, Access(None), Access(None, metrics=digest(b"scrape"))):
        with pytest.raises(UserError) as error:
            require_token_off_loopback(host, nothing, key="learner")
        assert str(error.value).startswith(f"learner.host: {host or 'every address'} can be reached from outside")
        assert "set PALIMPSEST_SERVICE_TOKEN" in str(error.value)
    require_token_off_loopback(host, access(*TOKENS), key="learner")


@pytest.mark.parametrize(
    ("method", "origin", "refused"),
    [
        ("POST", None, False),
        ("POST", b"http://127.0.0.1:8000", False),
        ("POST", b"http://127.0.0.1:9000", True),
        ("PATCH", b"https://example.com", True),
        ("POST", b"null", True),
        ("GET", b"https://example.com", False),
    ],
)
def test_without_tokens_a_page_of_another_site_changes_nothing(
    method: str, origin: bytes | None, refused: bool
) -> None:
    headers = [(b"host", b"127.0.0.1:8000"), *([(b"origin", origin)] if origin else [])]
    try:
        Access(hosts=frozenset({"localhost"})).check(method, "/v1/actions/stop", headers, COMMON_RULES)
        answer = None
    except HttpError as error:
        answer = error.body["code"]
    assert answer == ("wrong_origin" if refused else None)
