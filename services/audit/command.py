"""`palimpsest audit ...`: what is asked, and the answer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from palimpsest.common.config import load
from palimpsest.common.config.schema import RunConfig
from palimpsest.common.user_error import ExitCode, UserError
from palimpsest.services.audit import rendering
from palimpsest.services.audit.judge import judge
from palimpsest.services.audit.read import read
from palimpsest.services.report.folder import settled_in
from palimpsest.services.snapshot_store.storage import Unavailable


@dataclass(frozen=True, slots=True)
class CommandResult:
    """What to print, and how to exit."""

    text: str
    code: int


def run_command(arguments: Sequence[str], environment: Mapping[str, str]) -> CommandResult:
    """Audit the run that is named. Raises UserError."""
    if {"--help", "-h"} & set(arguments):
        return CommandResult(rendering.USAGE, 0)
    rest = [argument for argument in arguments if argument not in ("--quick", "--json")]
    if not rest:
        raise UserError(rendering.USAGE)
    config, home = _named(rest, environment)
    try:
        evidence = read(config, home, quick="--quick" in arguments)
    except Unavailable as silent:
        raise UserError(f"the snapshot store's storage cannot be read: {silent}", ExitCode.UNAVAILABLE) from None
    judgement = judge(evidence)
    if "--json" in arguments:
        text = msgspec.json.encode(rendering.to_json(evidence, judgement)).decode()
    else:
        text = "\n".join(rendering.to_text(evidence, judgement))
    return CommandResult(text, 0 if judgement.sound else 1)


def _named(arguments: Sequence[str], environment: Mapping[str, str]) -> tuple[RunConfig, Path]:
    """The run's configuration and the folder of its files, wherever that lies now."""
    if len(arguments) == 1 and not arguments[0].startswith("-") and not arguments[0].endswith(".toml"):
        folder = Path(arguments[0])
        config = settled_in(folder)
        store = config.snapshot_store
        store = store.model_copy(update={"folder": store.folder or folder / "snapshots"})
        return config.model_copy(update={"snapshot_store": store}), folder
    config = load(arguments, environment, program=rendering.PROGRAM).config
    if not config.run.id:
        raise UserError("run.id is empty: name the run that is meant, for example --run.id=first, or give its folder")
    return config, config.run.home
