"""Decides who may send which request: tokens, roles and the Host header. Pure.

A tokens file has one `name role blake3-hex` a line. It holds the digests of the tokens, so that the file alone gives
no access. A name may have two live tokens, so that a token can be replaced without an outage.
"""

import hmac
import ipaddress
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from blake3 import blake3

from palimpsest.common.control.errors import HttpError
from palimpsest.common.digests import is_digest
from palimpsest.common.user_error import UserError

TOKENS_FILE = "PALIMPSEST_TOKENS_FILE"
SERVICE_TOKEN = "PALIMPSEST_SERVICE_TOKEN"  # noqa: S105 - the name of the variable
METRICS_TOKEN = "PALIMPSEST_METRICS_TOKEN"  # noqa: S105 - the name of the variable
OPERATOR_TOKEN = "PALIMPSEST_TOKEN"  # noqa: S105 - the name of the variable
TOKENS_OF_A_NAME = 2
"""Maximum number of live tokens of one name."""
LONGEST_TOKEN = 512
"""In characters."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_.-]+)(:[0-9]{1,5})?")


class Role(StrEnum):
    """What the holder of a token may do. Each of the first three includes the ones before it."""

    VIEW = "view"
    """Read the status."""
    OPERATE = "operate"
    """End sessions, pause, drain, stop."""
    TUNE = "tune"
    """Change settings."""
    SERVICE = "service"
    """The requests of the services to each other; includes `view`."""


_LADDER = (Role.VIEW, Role.OPERATE, Role.TUNE)


def includes(held: Role, needed: Role) -> bool:
    """Return whether a token of role `held` may send what needs `needed`.

    >>> [includes(Role.OPERATE, needed) for needed in Role]
    [True, True, False, False]
    >>> [includes(Role.SERVICE, needed) for needed in Role]
    [True, False, False, True]
    """
    if held is Role.SERVICE or needed is Role.SERVICE:
        return held is needed or needed is Role.VIEW
    return _LADDER.index(held) >= _LADDER.index(needed)


@dataclass(frozen=True, slots=True)
class Token:
    """A token that gives access, known by its digest."""

    name: str
    role: Role
    digest: str
    """blake3 of the token, hex."""


def digest(token: bytes) -> str:
    """Return the digest of a token, as the tokens file has it."""
    return blake3(token).hexdigest()


def token_line(name: str, role: str, token: str) -> str:
    """Return the line of the tokens file for a token. Raises UserError for an invalid name or role."""
    return "{0.name} {0.role} {0.digest}".format(_token(f"{name} {role} {digest(token.encode())}", "the new token"))


def parse_tokens(text: str, where: str) -> tuple[Token, ...]:
    """Return the tokens of a tokens file. Empty lines and lines that start with # are skipped. Raises UserError."""
    lines = [(f"{where}, line {number}", line.strip()) for number, line in enumerate(text.splitlines(), start=1)]
    tokens = tuple(_token(line, place) for place, line in lines if line and not line.startswith("#"))
    for name, count in Counter(token.name for token in tokens).items():
        if count > TOKENS_OF_A_NAME:
            raise UserError(
                f"{where}: {name} has {count} tokens; a name has at most {TOKENS_OF_A_NAME}: remove the ones that are "
                f"no longer in use"
            )
    return tokens


def _token(line: str, where: str) -> Token:
    fields = line.split()
    if len(fields) != 3:
        raise UserError(
            f"{where}: expected `name role blake3-hex`, got {len(fields)} fields: `palimpsest token` makes a line"
        )
    name, role, found = fields
    if not _NAME.fullmatch(name):
        raise UserError(f"{where}: {name!r} is not a name: use letters, digits, `_`, `.` and `-`, 64 at most")
    if role not in list(Role):
        raise UserError(f"{where}: there is no role {role!r}; it can be {', '.join(Role)}")
    if not is_digest(found):
        raise UserError(
            f"{where}: the third field must be the blake3 of the token, 64 hex digits; `palimpsest token` makes a line"
        )
    return Token(name, Role(role), found)


def find_token(tokens: Iterable[Token], sent: bytes) -> Token | None:
    """Return the token that was sent, or None. The time does not depend on which digest matches."""
    given, found = digest(sent), None
    for token in tokens:
        if hmac.compare_digest(token.digest, given):
            found = token
    return found


@dataclass(frozen=True, slots=True)
class AccessRule:
    """The roles of which one is needed for a method and every path that starts with `path`."""

    method: str
    path: str
    roles: tuple[Role, ...]


COMMON_RULES = (
    AccessRule("GET", "/v1/status", (Role.VIEW,)),
    AccessRule("GET", "/docs", (Role.VIEW,)),
    AccessRule("GET", "/openapi.json", (Role.VIEW,)),
)
OPEN = frozenset({"/healthz", "/readyz", "/"})
"""Paths that need no token. `/` is the learner's page, which holds nothing of the run: its requests need a token."""
METRICS = "/metrics"
READING = frozenset({"GET", "HEAD", "OPTIONS"})
"""Methods that change nothing."""


@dataclass(frozen=True, slots=True)
class Access:
    """Decides about the requests of one service."""

    tokens: Callable[[], Sequence[Token]] | None = None
    """Returns the live tokens; None: requests need no token, so the service must listen on a loopback address."""
    metrics: str | None = None
    """Digest of the token that /metrics needs; None: /metrics is open."""
    hosts: frozenset[str] | None = None
    """Host names that a request may address while no token is needed; None: any."""

    def check(
        self, method: str, path: str, headers: Sequence[tuple[bytes, bytes]], rules: Sequence[AccessRule]
    ) -> Token | None:
        """Return the token of the request; None if the request needs none.

        Raises HttpError (401, 403) if the request is not permitted. Without a rule, it needs the role `service`.
        """
        hosts = [value for name, value in headers if name == b"host"]
        self._check_host(hosts)
        if self.tokens is None and method not in READING:
            _check_origin([value for name, value in headers if name == b"origin"], hosts)
        if path in OPEN or (path == METRICS and self.metrics is None):
            return None
        sent = bearer(headers)
        if path == METRICS and sent is not None and hmac.compare_digest(digest(sent), self.metrics or ""):
            return None
        if self.tokens is None:
            if path == METRICS:
                raise HttpError(401, "unauthorized", f"`Authorization: Bearer` with {METRICS_TOKEN} is required")
            return None
        token = None if sent is None else find_token(self.tokens(), sent)
        if token is None:
            raise HttpError(
                401,
                "unauthorized",
                f"`Authorization: Bearer` with a token of {TOKENS_FILE} or {SERVICE_TOKEN} is required",
            )
        needed = (Role.VIEW,) if path == METRICS else needed_roles(method, path, rules)
        if not any(includes(token.role, role) for role in needed):
            raise HttpError(
                403, "forbidden", f"{token.name} has the role {token.role}; {method} {path} needs {' or '.join(needed)}"
            )
        return token

    def _check_host(self, sent: Sequence[bytes]) -> None:
        """Refuse a request that a web page sends to a loopback address under a name of its own (DNS rebinding)."""
        match = _HOST.fullmatch(sent[0].decode("latin-1")) if len(sent) == 1 else None
        if match is None and (self.tokens is not None or self.hosts is not None):
            raise HttpError(403, "wrong_host", "one Host header with a host name or an address is required")
        if match is None or self.tokens is not None or self.hosts is None:
            return
        name = match[1].strip("[]").lower()
        if name not in self.hosts and not _is_address(name):
            raise HttpError(403, "wrong_host", f"the Host header names {name}, which is not a name of this service")


def _check_origin(origins: Sequence[bytes], hosts: Sequence[bytes]) -> None:
    """Refuse a change that a page of another site sends through the browser of a person on this machine.

    A browser names the site in Origin. Other clients send none. Where a token is needed, such a page has none.
    """
    if origins and [origin.partition(b"://")[2] for origin in origins] != list(hosts):
        raise HttpError(403, "wrong_origin", "a page of another site sent the request: use the page of this service")


def needed_roles(method: str, path: str, rules: Sequence[AccessRule]) -> tuple[Role, ...]:
    """Return the roles of the first rule for this request, or the role `service`.

    >>> needed_roles("GET", "/v1/status", COMMON_RULES), needed_roles("POST", "/v1/status", COMMON_RULES)
    ((<Role.VIEW: 'view'>,), (<Role.SERVICE: 'service'>,))
    """
    for rule in rules:
        if rule.method == method and path.startswith(rule.path):
            return rule.roles
    return (Role.SERVICE,)


def bearer(headers: Sequence[tuple[bytes, bytes]]) -> bytes | None:
    """Return the token of the only Authorization header, or None."""
    values = [value for name, value in headers if name == b"authorization"]
    if len(values) != 1 or len(values[0]) > LONGEST_TOKEN + 7:
        return None
    scheme, _, token = values[0].partition(b" ")
    return token if scheme.lower() == b"bearer" and token else None


def require_token_off_loopback(host: str, access: Access | None, *, key: str) -> None:
    """Raise UserError if other machines could reach a service that needs no token."""
    if (access is None or access.tokens is None) and not is_loopback(host):
        raise UserError(
            f"{key}.host: {host or 'every address'} can be reached from outside this machine, and every client could "
            f"use the service: set {SERVICE_TOKEN} to one secret for all services, or {TOKENS_FILE} to a file that "
            f"`palimpsest token` makes lines for (docs/operations.md, Access), or listen on 127.0.0.1"
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address. Names other than localhost count as reachable."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
