"""The shared secret between rollout workers and the gateway. It comes from the environment only."""

from collections.abc import Mapping

from palimpsest.common.user_error import Refusal

VARIABLE = "PALIMPSEST_GATEWAY_TOKEN"


def token(environment: Mapping[str, str]) -> str | None:
    """The token, if one is set. Raises Refusal when it could not stand in a header."""
    found = environment.get(VARIABLE, "").strip()
    if not (found.isascii() and found.isprintable()) or " " in found:
        raise Refusal(f"{VARIABLE} must be printable ASCII without spaces: it is sent in a header")
    return found or None
