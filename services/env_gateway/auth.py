"""Authentication: on a loopback address every process of the machine has access, elsewhere requests need the token."""

import hmac
import ipaddress

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from palimpsest.common.service import HttpError
from palimpsest.common.sessions.token import VARIABLE
from palimpsest.common.user_error import UserError
from palimpsest.services.env_gateway import instruments

GUARDED = "/v1"
"""Path prefix of the routes that need the token; health and metrics do not."""


def require_token_off_loopback(host: str, token: str | None) -> None:
    """Raise UserError if other machines could reach the gateway without a token."""
    if token is None and not is_loopback(host):
        raise UserError(
            f"env_gateway.host: {host or 'every address'} can be reached from outside this machine, and every "
            f"client can run environments there: set {VARIABLE} to a secret (for the gateway and for the "
            f"rollout workers), or listen on 127.0.0.1"
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address. Names other than localhost count as reachable."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class BearerAuth:
    """Middleware that rejects requests without the token. The comparison takes constant time."""

    def __init__(self, app: ASGIApp, *, token: str) -> None:
        self._app = app
        self._expected = f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] == "http" and scope["path"].startswith(GUARDED) and not self._admitted(scope):
            instruments.REFUSED.labels("unauthorized").inc()
            error = HttpError(401, "unauthorized", f"`Authorization: Bearer` with the token of {VARIABLE} is required")
            await JSONResponse(error.body, 401, {"WWW-Authenticate": "Bearer"})(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _admitted(self, scope: Scope) -> bool:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        return len(given) == 1 and hmac.compare_digest(given[0], self._expected)
