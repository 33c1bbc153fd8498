"""`palimpsest token NAME ROLE`: makes a token for the HTTP services."""

import secrets
import sys
from collections.abc import Sequence

from palimpsest.common.control.access import TOKENS_FILE, Role, token_line
from palimpsest.common.user_error import UserError

USAGE = f"""\
usage: palimpsest token NAME ROLE

Make a token. Standard output has the line for the file that {TOKENS_FILE} names; standard error has the token itself,
which is stored nowhere.

  NAME    who uses it; a name may have two live tokens, so that one can replace the other
  ROLE    {", ".join(Role)}"""
TOKEN_BYTES = 32


def command(arguments: Sequence[str]) -> None:
    """Make a token and print its line and the token. Raises UserError for invalid arguments."""
    if {"--help", "-h"} & set(arguments):
        print(USAGE)
        return
    if flags := [argument for argument in arguments if argument.startswith("-")]:
        raise UserError(f"palimpsest token {flags[0]}: there is no such flag\n{USAGE}")
    if len(arguments) != 2:
        raise UserError(USAGE)
    name, role = arguments
    token = secrets.token_urlsafe(TOKEN_BYTES)
    line = token_line(name, role, token)
    print(f"the token of {name}, shown only now: {token}", file=sys.stderr)
    print(line)
