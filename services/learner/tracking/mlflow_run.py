"""mlflow: a tracking server or a database."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from palimpsest.common.files import write

RUN_ID = "mlflow-run-id"
"""File with the id that mlflow gave the run, so that a restart continues the same run."""


class MlflowRun:
    """See port.py."""

    def __init__(self, folder: Path, *, url: str, project: str, run: str) -> None:
        """url: of the tracking server; empty: mlflow's own settings decide."""
        self._file, self._url, self._project, self._run = folder / RUN_ID, url, project, run
        self._client: Any = None
        self._id = ""

    def open(self, *, kept: int) -> None:
        from mlflow import MlflowClient

        self._client = MlflowClient(tracking_uri=self._url or None)
        if self._file.exists():
            self._id = self._file.read_text()
            self._client.set_terminated(self._id, "RUNNING")
            return
        found = self._client.get_experiment_by_name(self._project)
        experiment = found.experiment_id if found else self._client.create_experiment(self._project)
        self._id = self._client.create_run(experiment, run_name=self._run).info.run_id
        write(self._file, self._id.encode())

    def log(self, version: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())  # milliseconds
        self._client.log_batch(self._id, [Metric(name, value, now, version) for name, value in values.items()])

    def close(self) -> None:
        self._client.set_terminated(self._id)
