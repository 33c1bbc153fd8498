"""`palimpsest acls`: prints the commands that give each role its rights on the topics of a run."""

import os
from collections.abc import Sequence

from palimpsest.common.bus.kafka.rights import ROLES, commands
from palimpsest.common.config import load
from palimpsest.common.program import print_line
from palimpsest.common.user_error import UserError

USAGE = """\
usage: palimpsest acls RUN.toml [ROLE=PRINCIPAL ...] [--SECTION.KEY=VALUE ...]

Print the kafka-acls.sh commands that give each role its rights on the topics of a run, and no others.

  ROLE=PRINCIPAL    for example rollout=User:worker; the default is ROLE=User:ROLE
  roles             """ + "\n                    ".join(f"{role}: {rights.does}" for role, rights in ROLES.items())


def command(arguments: Sequence[str]) -> None:
    """Print the commands. Raises UserError."""
    if {"--help", "-h"} & set(arguments) or not arguments:
        if arguments:
            print_line(USAGE)
            return
        raise UserError(USAGE)
    given = [word for word in arguments if "=" in word and not word.startswith("-")]
    config = load([word for word in arguments if word not in given], os.environ, program="palimpsest acls").config
    if config.bus.kind != "kafka":
        raise UserError('bus.kind is not "kafka": the log in a file has the rights of its file')
    if not config.topic_prefix.strip(".") or (not config.run.id and not config.bus.topic_prefix):
        raise UserError("run.id and bus.topic_prefix are empty: the rights are those on the topics of one run")
    principals = {role: f"User:{role}" for role in ROLES}
    for word in given:
        role, _, principal = word.partition("=")
        if role not in ROLES:
            raise UserError(f"{word}: there is no role {role!r}; it can be {', '.join(ROLES)}")
        if not principal.partition(":")[2] or set(principal) & set(" '\"\\$`"):
            raise UserError(f"{word}: a principal is TYPE:NAME without spaces and quotes, for example User:worker")
        principals[role] = principal
    for line in commands(principals, config.topic_prefix, config.bus.servers):
        print_line(line)
