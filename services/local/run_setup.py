"""Run folders: a new one for a new run, the old one for a run that goes on."""

import datetime
from dataclasses import dataclass
from pathlib import Path

from palimpsest.common import run_folder
from palimpsest.common.config import Invocation, load
from palimpsest.common.config.schema import RunConfig
from palimpsest.common.config.to_toml import to_toml
from palimpsest.common.file_errors import usable_folder
from palimpsest.common.files import write
from palimpsest.common.user_error import UserError
from palimpsest.services.local.lock import RunLock
from palimpsest.services.local.run_identity import differences


@dataclass(frozen=True, slots=True)
class PreparedRun:
    """A run that is ours to supervise."""

    config: RunConfig
    saved: Path
    """Its file, which every service reads."""
    lock: RunLock


def resolve(invocation: Invocation) -> RunConfig:
    """The run to start or to go on with. Raises UserError when that would be another run. Changes nothing."""
    config, home = invocation.config, invocation.resume
    if home is None:
        return config
    if not (home / run_folder.RUN_FILE).is_file():
        raise UserError(f"--resume {home}: not the folder of a run (it has no {run_folder.RUN_FILE})")
    before = load([str(home / run_folder.RUN_FILE)], {}, program="").config
    if found := differences(before, config):
        told = "\n".join(f"  {key}: {old!r} there, {new!r} here" for key, old, new in found)
        raise UserError(
            f"--resume {home}: that run has another configuration:\n{told}\n"
            f"Give those values, or leave RUN.toml out to go on with the run's own, or start a new run"
        )
    return config.model_copy(update={"run": config.run.model_copy(update={"id": before.run.id, "folder": home.parent})})


def prepare_run(invocation: Invocation, *, now: datetime.datetime) -> PreparedRun:
    """Take the run's folder: nobody else may supervise it from here on. Raises UserError."""
    config = resolve(invocation)
    if invocation.resume is None:
        name = config.run.id or f"{now:%Y%m%d-%H%M%S}"
        config = config.model_copy(update={"run": config.run.model_copy(update={"id": name})})
    home = config.run.home
    usable_folder(home, key="run.folder")
    saved = home / run_folder.RUN_FILE
    lock = RunLock(home, now=now)
    if invocation.resume is None and saved.exists():
        raise UserError(f"{home} is another run already: go on with it by --resume {home}, or choose another --run.id")
    write(saved, to_toml(config).encode())
    return PreparedRun(config, saved, lock)
