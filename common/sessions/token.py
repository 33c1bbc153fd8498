"""The shared secret between rollout workers and the gateway. It comes from the environment only."""

from collections.abc import Mapping

from palimpsest.common.user_error import UserError

VARIABLE = "PALIMPSEST_GATEWAY_TOKEN"


def token(environment: Mapping[str, str]) -> str | None:
    """The token, if one is set. Raises UserError when it could not stand in a header."""
    found = environment.get(VARIABLE, "").strip()
    if not (found.isascii() and found.isprintable()) or " " in found:
        raise UserError(f"{VARIABLE} must be printable ASCII without spaces: it is sent in a header")
    return found or None
