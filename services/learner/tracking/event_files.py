"""TensorBoard: event files in the run's folder. No network."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any


class EventFiles:
    """See port.py."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None

    def open(self, *, kept: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # imports the extra

        # TensorBoard does not show the values of later versions that earlier files hold
        purge_step = kept + 1 if kept or self._folder.exists() else None
        self._writer = SummaryWriter(str(self._folder), purge_step=purge_step)

    def log(self, version: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, version)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
