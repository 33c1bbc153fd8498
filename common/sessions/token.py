"""The shared secret of rollout workers and gateway. It is read from an environment variable only."""

from collections.abc import Mapping

from palimpsest.common.user_error import UserError

VARIABLE = "PALIMPSEST_GATEWAY_TOKEN"


def token(environment: Mapping[str, str]) -> str | None:
    """Return the token, or None if it is not set. Raises UserError if it is not valid in an HTTP header."""
    found = environment.get(VARIABLE, "").strip()
    if not (found.isascii() and found.isprintable()) or " " in found:
        raise UserError(f"{VARIABLE} must be printable ASCII without spaces: it is sent in a header")
    return found or None
