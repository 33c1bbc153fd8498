"""Creates the folder of a new run, or takes the folder of a resumed run."""

import datetime
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from palimpsest.common import run_folder
from palimpsest.common.config import Invocation, load
from palimpsest.common.config.schema import RunConfig
from palimpsest.common.config.settings import value_of
from palimpsest.common.config.to_toml import to_toml
from palimpsest.common.file_errors import usable_folder
from palimpsest.common.files import write
from palimpsest.common.resumed_settings import hand_over, stated, stated_settings
from palimpsest.common.trajectory_limit import with_limit
from palimpsest.common.user_error import UserError
from palimpsest.services.local.lock import RunLock
from palimpsest.services.local.run_identity import differences


@dataclass(frozen=True, slots=True)
class PreparedRun:
    """A run that this process may supervise."""

    config: RunConfig
    saved: Path
    """The run's configuration file, which every service reads."""
    lock: RunLock
    before: Mapping[Path, bytes | None]
    """File that a resume changes -> what it held; None if it did not exist. {} for a new run."""


def resolve(invocation: Invocation) -> RunConfig:
    """Return the configuration to start or resume; writes nothing. Raises UserError if it does not match the run."""
    config, home = invocation.config, invocation.resume
    if home is None:
        return config
    if not (home / run_folder.RUN_FILE).is_file():
        raise UserError(f"--resume {home}: not the folder of a run (it has no {run_folder.RUN_FILE})")
    before = load([str(home / run_folder.RUN_FILE)], {}, program="").config
    if config.sampling.max_trajectory_tokens is None:  # the run keeps its limit, even if that of the model changed
        limit = {"max_trajectory_tokens": before.sampling.max_trajectory_tokens}
        config = config.model_copy(update={"sampling": config.sampling.model_copy(update=limit)})
    if found := differences(before, config):
        lines = "\n".join(f"  {key}: {old!r} there, {new!r} here" for key, old, new in found)
        raise UserError(
            f"--resume {home}: the run has another configuration:\n{lines}\n"
            f"Use the run's values, leave out RUN.toml to resume with its own configuration, or start a new run"
        )
    return config.model_copy(update={"run": config.run.model_copy(update={"id": before.run.id, "folder": home.parent})})


def prepare_run(invocation: Invocation, *, now: datetime.datetime) -> PreparedRun:
    """Create or open the run's folder and lock it. Raises UserError."""
    config = resolve(invocation)
    if invocation.resume is None:
        name = config.run.id or f"{now:%Y%m%d-%H%M%S}"
        config = config.model_copy(update={"run": config.run.model_copy(update={"id": name})})
    config = with_limit(config)
    home = config.run.home
    usable_folder(home, key="run.folder")
    saved = home / run_folder.RUN_FILE
    lock = RunLock(home, now=now)
    if invocation.resume is None and saved.exists():
        raise UserError(f"{home} already holds a run: continue it with --resume {home}, or choose another --run.id")
    before = {}
    if invocation.resume is not None:
        before = {file: _bytes(file) for file in (saved, home / run_folder.RESUMED_SETTINGS)}
        left = {key: value_of(config, key) for key in stated(home)}  # by a resume that died before the learner began
        own = stated_settings(load([str(saved)], {}, program="").config, config, invocation.overrides)
        hand_over(home, left | own)
    write(saved, to_toml(config).encode())
    return PreparedRun(config, saved, lock, before)


def _bytes(file: Path) -> bytes | None:
    return file.read_bytes() if file.exists() else None


def restore(prepared: PreparedRun) -> None:
    """Give a resumed run its files back: a service has refused the new configuration. Raises OSError."""
    for file, body in prepared.before.items():
        if body is None:
            file.unlink(missing_ok=True)
        else:
            write(file, body)
