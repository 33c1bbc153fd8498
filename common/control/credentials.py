"""Reads secrets and the tokens file from the places that environment variables name."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from palimpsest.common.control.access import (
    LONGEST_TOKEN,
    METRICS_TOKEN,
    OPERATOR_TOKEN,
    SERVICE_TOKEN,
    TOKENS_FILE,
    Access,
    Role,
    Token,
    digest,
    parse_tokens,
)
from palimpsest.common.logs import logger
from palimpsest.common.user_error import UserError

REPLACED = "PALIMPSEST_GATEWAY_TOKEN"
LOOK_S = 1.0
"""Interval between two looks at the tokens file, in seconds."""
_FILE = "_FILE"
SECRETS = tuple(name + end for name in (SERVICE_TOKEN, METRICS_TOKEN, OPERATOR_TOKEN) for end in ("", _FILE))
"""The variables that hold or name a secret."""


def secret(environment: Mapping[str, str], variable: str) -> str | None:
    """Return the secret in `variable`, or in the file that `variable`_FILE names; None if neither is set.

    Raises UserError if both are set, if the file cannot be read, or if the secret cannot be sent in a header.
    """
    text, path = environment.get(variable, ""), environment.get(variable + _FILE, "")
    if text.strip() and path:
        raise UserError(f"{variable} and {variable}{_FILE} are both set: remove one")
    name = variable
    if path:
        name = f"{variable}{_FILE} ({path})"
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{name} cannot be read: {error}") from None
        if not text.strip():
            raise UserError(f"{name} is empty: write the secret into it")
    found = text.strip()
    if not (found.isascii() and found.isprintable()) or " " in found:
        raise UserError(f"{name} must be printable ASCII without spaces: it is sent in a header")
    if len(found) > LONGEST_TOKEN:
        raise UserError(f"{name} has {len(found)} characters; a token has at most {LONGEST_TOKEN}")
    return found or None


def service_token(environment: Mapping[str, str]) -> str | None:
    """Return the token with which this process calls the other services, or None. Raises UserError."""
    if environment.get(REPLACED):
        raise UserError(f"{REPLACED} was replaced by {SERVICE_TOKEN}, which all services take: rename the variable")
    return secret(environment, SERVICE_TOKEN)


def operator_token(environment: Mapping[str, str]) -> str | None:
    """Return the token with which a person calls a service, or None. Raises UserError."""
    return secret(environment, OPERATOR_TOKEN)


def authorization(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the header with which this process calls the other services; empty without a token. Raises UserError."""
    token = service_token(environment)
    return {"Authorization": f"Bearer {token}"} if token else {}


def open_access(environment: Mapping[str, str], *hosts: str) -> Access:
    """Return the access rules of a service of this environment. hosts: names that clients know it by.

    Raises UserError if a secret or the tokens file cannot be used.
    """
    own, metrics = service_token(environment), secret(environment, METRICS_TOKEN)
    tokens: Callable[[], Sequence[Token]] | None = None
    if path := environment.get(TOKENS_FILE):
        tokens = TokensFile(Path(path)).tokens
    elif own is not None:
        only = (Token("service", Role.SERVICE, digest(own.encode())),)
        tokens = lambda: only  # noqa: E731
    return Access(
        tokens,
        metrics=None if metrics is None else digest(metrics.encode()),
        hosts=frozenset({"localhost", *(host.lower() for host in hosts if host)}),
    )


class TokensFile:
    """The tokens of a file, read again when the file changes.

    If the file becomes invalid, the last valid tokens stay in force and the log says why. `clock` in seconds.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._path, self._clock = path, clock
        self._seen = self._stamp()
        self._looked = clock()
        self._tokens = self._read()
        if not self._tokens:
            raise UserError(f"{TOKENS_FILE}: {path} has no token: add a line that `palimpsest token` makes")

    def tokens(self) -> tuple[Token, ...]:
        """Return the live tokens."""
        if self._clock() - self._looked < LOOK_S:
            return self._tokens
        self._looked = self._clock()
        if (stamp := self._stamp()) != self._seen:
            self._seen = stamp
            try:
                self._tokens = self._read()
            except UserError as error:
                logger().error("the tokens file cannot be used; the earlier tokens stay in force", reason=str(error))
            else:
                logger().info("read the tokens file again", tokens=len(self._tokens))
        return self._tokens

    def _stamp(self) -> tuple[int, int, int] | None:
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino

    def _read(self) -> tuple[Token, ...]:
        try:
            text = self._path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{TOKENS_FILE}: {self._path} cannot be read: {error}") from None
        return parse_tokens(text, str(self._path))
