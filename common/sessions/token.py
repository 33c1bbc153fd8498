"""The shared secret of rollout workers and gateway, from an environment variable or from the file that one names."""

from collections.abc import Mapping
from pathlib import Path

from palimpsest.common.user_error import UserError

VARIABLE = "PALIMPSEST_GATEWAY_TOKEN"
"""The variable. With the suffix _FILE it holds the path of a file with the token."""


def token(environment: Mapping[str, str]) -> str | None:
    """Return the token, or None if it is not set.

    Raises UserError if it is not valid in an HTTP header, or if its file cannot be read or is empty.
    """
    found = environment.get(VARIABLE, "").strip()
    if not found and (file := environment.get(f"{VARIABLE}_FILE")):
        try:
            found = Path(file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{VARIABLE}_FILE = {file}: cannot be read ({error})") from None
        if not found:
            raise UserError(f"{VARIABLE}_FILE = {file}: the file is empty; it must hold the token")
    if not (found.isascii() and found.isprintable()) or " " in found:
        raise UserError(f"{VARIABLE} must be printable ASCII without spaces: it is sent in a header")
    return found or None
