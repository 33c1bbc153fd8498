"""Resolves the run that a command line names: its folder, or its run file with flags."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from palimpsest.common import run_folder
from palimpsest.common.config import load
from palimpsest.common.config.schema import RunConfig
from palimpsest.common.user_error import UserError
from palimpsest.services.report.folder import read_run_config


def named_run(arguments: Sequence[str], environment: Mapping[str, str], *, program: str) -> tuple[RunConfig, Path]:
    """Return the run's configuration and the current folder of its files. Raises UserError."""
    if len(arguments) == 1 and not arguments[0].startswith("-") and not arguments[0].endswith(".toml"):
        folder = Path(arguments[0])
        config = read_run_config(folder)
        store = config.snapshot_store
        store = store.model_copy(update={"folder": store.folder or folder / run_folder.SNAPSHOTS})
        return config.model_copy(update={"snapshot_store": store}), folder
    config = load(arguments, environment, program=program).config
    if not config.run.id:
        raise UserError("run.id is empty: name the run, for example --run.id=first, or give its folder")
    return config, config.run.home
