"""Weights & Biases. Its own variables decide about the account and the mode (WANDB_API_KEY, WANDB_MODE)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any


class WandbRun:
    """See port.py. The id of the run is its name, so that a restart continues the same run."""

    def __init__(self, folder: Path, *, project: str, run: str) -> None:
        self._folder, self._project, self._run = folder, project, run
        self._opened: Any = None

    def open(self, *, kept: int) -> None:
        import wandb

        self._folder.mkdir(parents=True, exist_ok=True)
        self._opened = wandb.init(
            project=self._project,
            id=self._run,
            name=self._run,
            dir=str(self._folder),
            resume="allow",
            settings=wandb.Settings(console="off", x_disable_stats=True),
        )
        # steps of wandb only grow, but a restart may train a version again
        self._opened.define_metric("*", step_metric="version")

    def log(self, version: int, values: Mapping[str, float]) -> None:
        self._opened.log({"version": version, **values})

    def close(self) -> None:
        self._opened.finish()
