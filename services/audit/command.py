"""The command `palimpsest audit`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

from palimpsest.common.user_error import ExitCode, UserError
from palimpsest.services.audit import rendering
from palimpsest.services.audit.judge import judge
from palimpsest.services.audit.read import read
from palimpsest.services.report.named_run import named_run
from palimpsest.services.snapshot_store.storage import Unavailable


@dataclass(frozen=True, slots=True)
class CommandResult:
    """The output and the exit code."""

    text: str
    code: int


def run_command(arguments: Sequence[str], environment: Mapping[str, str]) -> CommandResult:
    """Audit the run that the arguments name. Raises UserError."""
    if {"--help", "-h"} & set(arguments):
        return CommandResult(rendering.USAGE, 0)
    rest = [argument for argument in arguments if argument not in ("--quick", "--json")]
    if not rest:
        raise UserError(rendering.USAGE)
    config, home = named_run(rest, environment, program=rendering.PROGRAM)
    try:
        evidence = read(config, home, quick="--quick" in arguments)
    except Unavailable as error:
        raise UserError(f"the snapshot store's storage cannot be read: {error}", ExitCode.UNAVAILABLE) from None
    judgement = judge(evidence)
    if "--json" in arguments:
        text = msgspec.json.encode(rendering.to_json(evidence, judgement)).decode()
    else:
        text = "\n".join(rendering.to_text(evidence, judgement))
    return CommandResult(text, 0 if judgement.sound else 1)
